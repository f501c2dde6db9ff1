"""CUDA source to PTX: what generated code asks of the C++ library, and what is refused."""

import re

import pytest

from stages.targets import toolchain
from stages.targets.cuda import nvrtc

toolkit = toolchain.toolkit()
pytestmark = pytest.mark.skipif(
    toolkit is None or toolchain.part(toolkit, "libnvrtc.so.13") is None, reason="no NVRTC on this machine"
)
OPTIONS = ["-arch=compute_80", "-std=c++17"]


def ptx(source, options=OPTIONS):
    library, header = (toolchain.part(toolkit, name) for name in ("libnvrtc.so.13", "cuda_fp16.h"))
    return nvrtc.compile_ptx(source, library, header.parent, options).decode()


TRAITS = """
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>
using namespace cuda::std;
#define SIZE(n) static_assert(sizeof(int##n##_t) == n / 8 && sizeof(uint##n##_t) == n / 8 \\
                              && is_signed<int##n##_t>::value && is_unsigned<uint##n##_t>::value)
SIZE(8); SIZE(16); SIZE(32); SIZE(64);
struct other {};
enum number { one };
static_assert(is_same_v<int, int> && !is_same_v<int, unsigned> && !is_same<int, const int>::value);
static_assert(is_integral<const bool>::value && is_integral<volatile unsigned char>::value);
static_assert(!is_integral<float>::value && !is_integral<number>::value && !is_integral<int*>::value);
static_assert(is_signed<char>::value && is_signed<const double>::value && !is_signed<other>::value);
static_assert(is_unsigned<bool>::value && !is_unsigned<float>::value && !is_unsigned<other>::value);
static_assert(is_floating_point<const volatile float>::value && !is_floating_point<int>::value);
static_assert(is_same_v<conditional<true, int, other>::type, int>);
static_assert(is_same_v<conditional<false, int, other>::type, other>);
template <class T> typename enable_if<is_integral<T>::value, int>::type __device__ choose(T) { return 1; }
template <class T> typename enable_if<!is_integral<T>::value, float>::type __device__ choose(T) { return 2; }
static_assert(sizeof(choose(1)) == 4 && is_same_v<decltype(choose(1.0)), float>);
"""


def test_the_headers_of_ours_say_what_those_of_the_standard_library_say():
    assert ".target sm_80" in ptx(TRAITS)


@pytest.mark.parametrize("false", ["is_same_v<int, long>", "is_integral<other>::value", "is_unsigned<int>::value"])
def test_what_is_false_fails(false):
    with pytest.raises(nvrtc.NvrtcError, match=r"kernels.cu\(\d+\): error: static assertion failed"):
        ptx(f"{TRAITS}static_assert({false});")


def test_an_option_that_nvrtc_does_not_know_is_named():
    with pytest.raises(nvrtc.NvrtcError, match="INVALID_OPTION"):
        ptx("", [*OPTIONS, "--no-such-option"])


def test_a_file_that_is_no_library_is_named(tmp_path):
    (tmp_path / "libnvrtc.so.13").write_text("no library")
    with pytest.raises(nvrtc.NvrtcError, match=re.escape(str(tmp_path / "libnvrtc.so.13"))):
        nvrtc.compile_ptx("", tmp_path / "libnvrtc.so.13", tmp_path, OPTIONS)
