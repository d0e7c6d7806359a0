// The types that TensorRT's headers take from CUDA, for the host build: they are only passed on.
#ifndef TOKCOMPILE_CUDA_RUNTIME_API_H
#define TOKCOMPILE_CUDA_RUNTIME_API_H

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

#endif
