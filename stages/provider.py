"""The provider record: all that the stages bring to the engine, by name, so that nothing is imported before use."""

from __future__ import annotations

from stagegraph.registry import Comparison, Lookup, Plot, Provider, Section, Starter, Verb

PROVIDER = Provider(
    stages={
        "config-parse": "stages.config_parse:ConfigParse",
        "param-register": "stages.param_register:ParamRegister",
        "graph-build": "stages.graph_build:GraphBuild",
        "allocate": "stages.allocate:Allocate",
        "calibrate": "stages.calibrate:Calibrate",
        "quantize": "stages.quantize:Quantize",
        "compile": "stages.compile:Compile",
        "tokenizer-bundle": "stages.tokenizer_bundle:TokenizerBundle",
        "bundle": "stages.bundle:Bundle",
        "verify": "stages.verify:Verify",
        "bench": "stages.bench:Bench",
    },
    # What is loaded before a compiler differs from what is loaded before a bundle runs.
    profiles={"compiler": "stages.profiles:compiler", "runtime": "stages.runtime.backend:tvm"},
    # What compilers and TVM read beside their arguments; and by what NumPy and torch take other instructions, which
    # add up in another order, or keep fewer digits.
    hidden_variables=frozenset({
        "CPATH", "CPLUS_INCLUDE_PATH", "C_INCLUDE_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX", "LIBRARY_PATH",
        "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "SOURCE_DATE_EPOCH", "TVM_USE_RUNTIME_LIB",
        "TVM_CUDA_COMPILE_MODE", "TVM_CUDA_NVCC_NO_FAST_MATH", "TVM_LIBRARY_PATH",
        "ATEN_CPU_CAPABILITY", "BLIS_ARCH_TYPE", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR",
        "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES",
        "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    }),
    verbs={
        "generate": Verb("stages.cli.generate", "generate text from a bundle"),
        "chat": Verb("stages.cli.chat", "talk with a bundle, in several turns"),
        "serve": Verb("stages.cli.serve", "let programs use bundles, by the OpenAI API"),
        "verify": Verb("stages.cli.verify", "hold a bundle against its certificate on this machine"),
        "sign": Verb("stages.cli.sign", "sign an exported bundle with a key of your own"),
        "attest": Verb("stages.cli.attest", "keep what `verify` said on another machine beside a bundle"),
        "models": Verb("stages.cli.models", "list the model families and what each supports"),
        "tokenize": Verb("stages.cli.tokenize", "show how a tokenizer reads a text, and where another differs"),
    },
    starters={
        "checkpoint": Starter(
            "stages.cli.starter", exports="bundle", doc="its folder, or a GGUF file", then=("chat", "serve")
        ),
    },
    lookups={
        "tensor": Lookup(
            stage="param-register",
            output="params",
            inputs=("tensors",),
            module="stages.inspection.tensors",
            doc="what a parameter is made of, or what a checkpoint tensor becomes",
        ),
    },
    comparers={
        "graph-build": "stages.inspection.compare:graphs",
        "compile": "stages.inspection.compare:libraries",
        "quantize": "stages.inspection.weights:weights",
        "tokenizer-bundle": "stages.inspection.compare:tokenizers",
    },
    file_diffs={".safetensors": "stages.inspection.shards:changed"},
    comparisons={
        "bundle": Comparison(
            files={
                "bundle": ("bundle/bundle.json", "bundle/tensor-cache.json"),
                "verify": ("verify.json",),
                "bench": ("bench.json",),
            },
            module="stages.inspection.bundles",
        ),
    },
    sources={"hf": "stages.checkpoint.hub"},
    charts={
        "quantize": Plot("report.json", "stages.inspection.charts:stored"),
        "verify": Plot("verify.json", "stages.inspection.charts:divergence"),
    },
    sections={
        "compile": (
            Section("Memory plan", "memory"),
            Section(
                "Kernels, by the time to compile them",
                "kernels",
                "How long each runs is measured by an entry of the stage bench: docs/comparing.md.",
            ),
        ),
        "bench": (Section("Kernels, by the time that they run on this machine", "kernels"),),
        "verify": (Section("What its certificate rests on", "card"),),
    },
    plots={"quantize": Plot("report.json", "stages.inspection.error_plot:draw")},
)  # fmt: skip
