"""Stands in for cuda.bindings.runtime: device memory is the host's; calls give (error, values...) as the real ones do."""

import ctypes
import enum
import time

cudaMemcpyKind = enum.Enum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
OK = 0
memory = {}


class Stream:
    def __int__(self):
        return 7


class Event:
    when = 0.0


class Properties:
    name = b"no GPU"


def cudaStreamCreate():
    return OK, Stream()


def cudaMalloc(size):
    buffer = ctypes.create_string_buffer(size)
    memory[ctypes.addressof(buffer)] = buffer
    return OK, ctypes.addressof(buffer)


def cudaFree(pointer):
    del memory[pointer]
    return (OK,)


def cudaMemcpy(to, source, count, kind):
    device = to if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else source
    if device not in memory or len(memory[device]) < count:
        return (1,)
    ctypes.memmove(to, source, count)
    return (OK,)


def cudaGetErrorString(error):
    return OK, b"invalid argument"


def cudaEventCreate():
    return OK, Event()


def cudaEventRecord(event, stream):
    event.when = time.perf_counter()
    return (OK,)


def cudaEventElapsedTime(start, stop):
    return OK, (stop.when - start.when) * 1e3


def cudaEventDestroy(event):
    return (OK,)


def cudaStreamSynchronize(stream):
    return (OK,)


def cudaStreamDestroy(stream):
    return (OK,)


def cudaGetDeviceProperties(device):
    return OK, Properties()
