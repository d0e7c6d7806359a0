#!/usr/bin/env bash
# Builds, on the device that will run it: the plugin library with its nvcc, then the engine with its trtexec.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# what this bundle is; settings.sh says it
name='' title='' machine='' preset='' has_plugin=0 has_plain=0 oldest_plugin='' oldest_plain=''
usual_trtexec='' include_dir=''
# shellcheck source=/dev/null
. ./settings.sh

usage() {
  cat <<'TEXT'
usage: ./build.sh [--plain] [--prebuilt] [--example] [--triton] [--dry-run] [-- TRTEXEC_OPTION...]

  --plain     no plugin library: the engine of model.plain.onnx, in which the reductions are ordinary ops
  --prebuilt  take the plugin library in bin/ instead of compiling it
  --example   also build the C++ example, build/cpp/example
  --triton    also put the engine into triton/model_repository (and build what loads the plugin there)
  --dry-run   print the commands and run none

Options after -- go to trtexec as they are, such as: ./build.sh -- --memPoolSize=workspace:1024

Environment:
  TRTEXEC               trtexec, if it is in none of the usual places
  TENSORRT_INCLUDE_DIR  folder of NvInfer.h
  TENSORRT_LIB_DIR      folder of libnvinfer.so (for --example and --triton)
  TENSORRT_VERSION      such as 10.3, if trtexec does not say
  CUDACXX               nvcc
  JOBS                  how many files to compile at once (default 2: one takes up to about 2 GB of memory)
TEXT
}

die() { # message, then one line of advice each
  echo "build.sh: error: $1" >&2
  shift
  if (($#)); then printf '  %s\n' "$@" >&2; fi
  exit 2
}

run() {
  printf '+'
  printf ' %q' "$@"
  echo
  if ((!dry)); then "$@"; fi
}

# What is missing ends the script, but not a dry run, which may happen elsewhere than on the device.
missing() {
  if ((!dry)); then die "$@"; fi
  echo "build.sh: would stop here: $1" >&2
  shift
  printf '  %s\n' "$@" >&2
}

first_file() { # the first argument that is an executable file
  local path
  for path; do
    if [[ -n $path && -x $path && ! -d $path ]]; then
      echo "$path"
      return
    fi
  done
}

find_tool() { # override, name, places...
  local override=$1 name=$2
  shift 2
  if [[ -n $override ]]; then
    first_file "$override"
  else
    first_file "$(command -v "$name" || true)" "$@"
  fi
}

# trtexec's first line says [TensorRT v100300] for 10.3.0
version_of() {
  local text number
  if [[ -n ${TENSORRT_VERSION:-} ]]; then
    echo "$TENSORRT_VERSION"
    return
  fi
  text=$("$1" --help 2>&1 || true)
  if [[ $text =~ \[TensorRT\ v([0-9]+)\] ]]; then
    number=${BASH_REMATCH[1]}
    echo "$((number / 10000)).$((number / 100 % 100))"
  fi
}

# The headers' own version, "10.3": a library for other headers than trtexec's may not load.
header_version() {
  awk '$1 == "#define" && $2 ~ /^(NV_TENSORRT|TRT)_(MAJOR|MINOR)(_ENTERPRISE)?$/ && $3 ~ /^[0-9]+$/ {
    if ($2 ~ /MAJOR/) major = $3; else minor = $3 } END { print major "." minor }' "$1/NvInferVersion.h"
}

find_headers() {
  local folder
  for folder in ${TENSORRT_INCLUDE_DIR:+"$TENSORRT_INCLUDE_DIR"} "$include_dir" /usr/include /usr/local/tensorrt/include; do
    if [[ -f $folder/NvInfer.h ]]; then
      echo "$folder"
      return
    fi
    if [[ -n ${TENSORRT_INCLUDE_DIR:-} ]]; then return; fi
  done
}

compile_plugin() {
  local nvcc
  nvcc=$(find_tool "${CUDACXX:-}" nvcc "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
  if [[ -z $nvcc ]]; then
    missing "nvcc${CUDACXX:+ ($CUDACXX)} was not found" "It comes with the CUDA toolkit; on a Jetson: sudo apt install nvidia-jetpack" \
      "If it lies elsewhere: CUDACXX=/path/to/nvcc ./build.sh" "Without it: ./build.sh --plain"
  fi
  need_cmake
  need_headers
  local found
  if [[ -n $headers ]]; then
    found=$(header_version "$headers")
    if [[ -n $version && ${found%%.*} != "${version%%.*}" ]]; then
      die "the headers in $headers are of TensorRT $found, and trtexec is of $version" \
        "Set TENSORRT_INCLUDE_DIR to the headers that belong to $trtexec."
    fi
  fi
  # the old cache may be of another device or TensorRT
  run rm -rf build/plugin
  run cmake -S plugins -B build/plugin --preset "$preset" \
    "-DCMAKE_CUDA_COMPILER=${nvcc:-nvcc}" "-DTENSORRT_INCLUDE_DIR=${headers:-$include_dir}"
  run cmake --build build/plugin --parallel "${JOBS:-2}"
  if ((!dry)) && [[ ! -f $library ]]; then die "cmake ended well, but there is no $library"; fi
}

need_cmake() {
  if ! command -v cmake >/dev/null; then missing "cmake was not found" "sudo apt install cmake"; fi
}

need_headers() {
  headers=$(find_headers)
  if [[ -z $headers ]]; then
    missing "NvInfer.h was not found${TENSORRT_INCLUDE_DIR:+ in $TENSORRT_INCLUDE_DIR}" \
      "It comes with TensorRT's development package: sudo apt install libnvinfer-headers-dev" \
      "If it lies elsewhere: TENSORRT_INCLUDE_DIR=/path/to/include ./build.sh"
  fi
}

compile_cpp() { # target: the example, or what registers the plugin in Triton
  need_cmake
  need_headers
  run cmake -S cpp -B build/cpp -DCMAKE_BUILD_TYPE=Release "-DTENSORRT_INCLUDE_DIR=${headers:-$include_dir}" \
    ${TENSORRT_LIB_DIR:+"-DTENSORRT_LIB_DIR=$TENSORRT_LIB_DIR"}
  run cmake --build build/cpp --target "$1"
}

form=plugin dry=0 prebuilt=0 example=0 triton=0 extra=()
while (($#)); do
  case $1 in
    --plain) form=plain ;;
    --prebuilt) prebuilt=1 ;;
    --example) example=1 ;;
    --triton) triton=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit ;;
    --)
      shift
      extra=("$@")
      break
      ;;
    *) die "there is no option $1" "./build.sh --help lists them; options of trtexec go after --" ;;
  esac
  shift
done
headers=''
if ((!has_plugin)); then form=plain; fi
if [[ $form == plain ]] && ((!has_plain)); then die "this bundle has no model.plain.onnx" "It was made with form='plugin'."; fi

if [[ $(uname -m) != "$machine" ]]; then
  missing "this bundle is for $title ($machine), and this machine is $(uname -m)" \
    "Engines belong to the device they are built on. Make a bundle for this one: tokcompile bundle --target ..."
fi
if command -v python3 >/dev/null; then
  python3 common.py || exit 2
fi

trtexec=$(find_tool "${TRTEXEC:-}" trtexec "$usual_trtexec" /usr/local/tensorrt/bin/trtexec)
version=''
if [[ -z $trtexec ]]; then
  missing "trtexec${TRTEXEC:+ ($TRTEXEC)} was not found" "It comes with TensorRT's Debian and tar packages (libnvinfer-bin), not with pip; on a Jetson it is" \
    "$usual_trtexec: sudo apt install nvidia-jetpack" \
    "If it lies elsewhere: TRTEXEC=/path/to/trtexec ./build.sh"
else
  version=$(version_of "$trtexec")
  if [[ -z $version ]]; then
    missing "$trtexec does not say its version" "Say it: TENSORRT_VERSION=10.3 ./build.sh"
  fi
fi
if [[ -n $version ]]; then
  if [[ ! $version =~ ^[0-9]+\.[0-9]+ ]]; then die "TENSORRT_VERSION=$version is not a version such as 10.3"; fi
  major=${version%%.*} minor=${version#*.}
  minor=${minor%%.*}
  oldest=$oldest_plugin
  if [[ $form == plain ]]; then oldest=$oldest_plain; fi
  if ((major * 1000 + minor < ${oldest%%.*} * 1000 + ${oldest#*.})); then
    die "TensorRT $version is older than the $oldest that model.$form.onnx needs" \
      "This bundle is for $title. With TensorRT $oldest_plain or later, ./build.sh --plain works without the plugin."
  fi
  echo "TensorRT $version, $trtexec"
else
  major=${oldest_plugin%%.*}
fi

library=build/plugin/libtokcompile_plugins.so
if [[ $form == plugin ]]; then
  if ((prebuilt)); then
    if [[ ! -f bin/libtokcompile_plugins.so ]]; then
      die "there is no bin/libtokcompile_plugins.so in this bundle" "Leave --prebuilt away to compile it here."
    fi
    run mkdir -p build/plugin
    run cp bin/libtokcompile_plugins.so "$library"
  else
    compile_plugin
  fi
fi

engine=build/model.$form.engine
files=("$engine" "model.$form.onnx")
if [[ -f model.$form.onnx.data ]]; then files+=("model.$form.onnx.data"); fi
if [[ $form == plugin ]]; then files+=("$library"); fi
flags="flags_${form}_$((major < 11 ? 10 : 11))[@]"
run mkdir -p build
# without this file run.py takes the engine for unfinished
run rm -f "$engine" "$engine.sha256"
run "${trtexec:-$usual_trtexec}" "${!flags}" "${extra[@]}"
echo "+ sha256sum ${files[*]} > $engine.sha256"
if ((!dry)); then
  if [[ ! -s $engine ]]; then die "trtexec ended well, but there is no $engine"; fi
  sha256sum "${files[@]}" >"$engine.sha256"
fi

if ((example)); then compile_cpp example; fi
if ((triton)); then
  run mkdir -p "triton/model_repository/$name/1"
  run cp "$engine" "triton/model_repository/$name/1/model.plan"
  if [[ $form == plugin ]]; then
    compile_cpp tokcompile_register
    run cp "$library" build/cpp/libtokcompile_register.so triton/
  fi
fi

if ((dry)); then
  echo "dry run: nothing was done"
else
  echo "done: $engine"
  echo "next: ./verify.py, then ./run.py"
fi
