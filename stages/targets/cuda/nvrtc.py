"""CUDA source to PTX in this process, by NVRTC (libnvrtc of a CUDA toolkit), which needs no host compiler and no GPU.

A kernel of nvcc's begins with half a second of preprocessing and parsing what a host program could ask of CUDA and of
the C++ library; NVRTC knows the device's side by itself. Interface: NVRTC 13, https://docs.nvidia.com/cuda/nvrtc.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_size_t, c_void_p
from pathlib import Path

NAME = "kernels.cu"  # what messages call the source
BUILTINS = "libnvrtc-builtins.so.*"  # libnvrtc opens it by its name alone, which finds what is loaded already
COMPILATION = 6  # NVRTC_ERROR_COMPILATION: the source is wrong, and the log says how
# What generated code includes of the C++ library. The toolkit's own files define these names too, and a hundred
# thousand lines beside, in a second of each kernel.
HEADERS = {
    "cuda/std/cstdint": """
namespace cuda { namespace std {
typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t; typedef long int64_t; typedef unsigned long uint64_t;
}}
""",
    "cuda/std/type_traits": """
namespace cuda { namespace std {
template <bool B> struct bool_constant { static constexpr bool value = B; };
template <class T, class U> struct is_same : bool_constant<false> {};
template <class T> struct is_same<T, T> : bool_constant<true> {};
template <class T, class U> inline constexpr bool is_same_v = is_same<T, U>::value;
template <class T, class... Us> struct is_any : bool_constant<(is_same<T, Us>::value || ...)> {};
template <class T> struct plain { typedef T type; };
template <class T> struct plain<const T> : plain<T> {};
template <class T> struct plain<volatile T> : plain<T> {};
template <class T> struct plain<const volatile T> : plain<T> {};
template <class T> struct is_floating_point : is_any<typename plain<T>::type, float, double> {};
template <class T> struct is_integral
    : is_any<typename plain<T>::type, bool, char, signed char, unsigned char, wchar_t, char16_t, char32_t, short,
             unsigned short, int, unsigned int, long, unsigned long, long long, unsigned long long> {};
template <class T, bool = is_integral<T>::value> struct is_unsigned : bool_constant<(T(0) < T(-1))> {};
template <class T> struct is_unsigned<T, false> : bool_constant<false> {};
template <class T, bool = is_integral<T>::value> struct is_signed : bool_constant<!(T(0) < T(-1))> {};
template <class T> struct is_signed<T, false> : is_floating_point<T> {};
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
}}
""",
}


class NvrtcError(ValueError):
    """NVRTC refused the source or cannot be loaded; the message is its own."""


def compile_ptx(source: str, library: Path, include: Path, options: Sequence[str]) -> bytes:
    """Return the PTX of CUDA ``source``; ``include`` holds the headers of the toolkit that ``library`` belongs to."""
    nvrtc = _loaded(library)
    names = (c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS))
    texts = (c_char_p * len(HEADERS))(*(text.encode() for text in HEADERS.values()))
    given = [option.encode() for option in (f"-I{include}", *options)]
    program = c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(byref(program), source.encode(), NAME.encode(), len(names), texts, names))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(given), (c_char_p * len(given))(*given))
        if status == COMPILATION:
            raise NvrtcError(_text(nvrtc, "ProgramLog", program).decode(errors="replace"))
        _check(nvrtc, status)
        return _text(nvrtc, "PTX", program)
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def architectures(library: Path) -> list[int]:
    """Return the architectures that the toolkit of ``library`` compiles for: 80 is sm_80."""
    nvrtc, count = _loaded(library), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(nvrtc, nvrtc.nvrtcGetSupportedArchs(found))
    return list(found)


@functools.cache
def _loaded(library: Path) -> ctypes.CDLL:
    try:
        for builtins in sorted(library.parent.glob(BUILTINS)):
            ctypes.CDLL(str(builtins))
        nvrtc = ctypes.CDLL(str(library))
    except OSError as error:
        raise NvrtcError(f"{library} cannot be loaded: {error}") from None
    nvrtc.nvrtcGetErrorString.restype = c_char_p
    return nvrtc


def _text(nvrtc: ctypes.CDLL, what: str, program: c_void_p) -> bytes:
    size = c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.value


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        raise NvrtcError(nvrtc.nvrtcGetErrorString(status).decode())
