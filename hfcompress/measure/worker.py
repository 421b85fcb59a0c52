"""Loads one model in a process of its own, as a user would, then runs, times and weighs it.

It is run by its path (`python -P worker.py`). It imports numpy and the model's runtime, but nothing of hfcompress
unless a request says so: a model that loads here loads anywhere. It reads one JSON request a line and answers each with
one line of JSON.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class TorchModel:
    """A model that `from_pretrained` loads from a directory."""

    def __init__(
        self,
        path: str,
        device: str,
        threads: int,
        auto_class: str,
        trust: bool,
        register: str | None,
        changes: dict[str, Any],
        dtype: str | None = None,
        examine: bool = True,
        **_: Any,
    ) -> None:
        import torch
        import transformers

        if register is not None:
            import_hfcompress(register)

        torch.set_num_threads(threads)
        self.torch, self.device = torch, device
        config = read_config(path)
        placed = {"device_map": device} if config.get("quantization_config") else {}
        dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
        model, info = getattr(transformers, auto_class).from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust,
            local_files_only=True,
            output_loading_info=True,
            # Weights of another size are reported, and the client refuses them by name.
            ignore_mismatched_sizes=not placed,
            **placed,
            **changes,
        )
        # A start that is timed skips this, because it reads all weights once more.
        self.loading = run_file("../models/loading_report.py")["loading_report"](model, info) if examine else None
        if (Path(path) / "adapter").is_dir():
            model.load_adapter(str(Path(path) / "adapter"))
        self.model = (model if placed else model.to(device)).eval()
        self.parameters = sum(p.numel() for p in model.parameters()) if not placed else None
        self.accepted = set(inspect.signature(self.model.forward).parameters)

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Moves a batch to the device, so that the move is not timed."""
        tensors = {k: self.torch.from_numpy(v).to(self.device) for k, v in batch.items() if k in self.accepted}
        self.finish()
        return tensors

    def __call__(self, batch: dict[str, Any]) -> Any:
        with self.torch.inference_mode():
            output = self.model(**batch)
            if "logits" in output:
                return output.logits.float().cpu().numpy()
            return self.torch.stack([output.start_logits, output.end_logits], dim=-1).float().cpu().numpy()

    def use_threads(self, threads: int) -> None:
        """Sets the threads of one operator."""
        if self.torch.get_num_threads() != threads:
            self.torch.set_num_threads(threads)

    def computing_type(self) -> None:
        """Returns None: it computes in the type that it was loaded in."""

    def finish(self) -> None:
        """Waits until the device is done."""
        if self.device.startswith("cuda"):
            self.torch.cuda.synchronize()

    def device_peak(self) -> int | None:
        """Returns the peak memory of PyTorch's tensors on the GPU, in bytes; None on a CPU.

        The CUDA context and the cache of PyTorch's allocator are not in it.
        """
        if not self.device.startswith("cuda"):
            return None
        return int(self.torch.cuda.max_memory_allocated(self.device))


def has_heads(config: dict[str, Any]) -> bool:
    """True if a model has attention heads left; without any, no token sees another and no attention mask is needed."""
    layers = config.get("per_layer_config") or {}
    heads = [layer.get("num_attention_heads", layer.get("n_heads", 1)) for layer in layers.values()]
    return not heads or any(heads)


class GraphModel:
    """An exported graph: chooses its inputs, and the outputs that are the logits."""

    parameters = None
    loading: dict[str, Any] | None = None

    def take(self, path: str, inputs: dict[str, tuple[str, list[Any]]], outputs: list[str], auto_class: str) -> None:
        """Checks the graph's inputs and outputs, and keeps them.

        Args:
            path: The model directory.
            inputs: For each input's name its numpy type and its axes.
            outputs: The names of the outputs.
            auto_class: Such as `AutoModelForSequenceClassification`.

        Raises:
            UnusableError: for a graph that cannot be measured.
        """
        self.inputs = {name: kind for name, (kind, _) in inputs.items()}
        self.config = read_config(path)
        self.meanings = {name: find_meaning(name) for name in inputs}
        unknown = sorted(name for name, meaning in self.meanings.items() if meaning is None)
        if unknown:
            raise UnusableError(
                f"the graph has an unknown input '{unknown[0]}'",
                "export the model without a cache, with the inputs that its tokenizer gives",
            )
        needed = ("input_ids", "attention_mask") if has_heads(self.config) else ("input_ids",)
        missing = [name for name in needed if name not in self.meanings.values()]
        if missing:
            raise UnusableError(
                f"the graph takes no '{missing[0]}'"
                + (", so padding would be read as text" if missing[0] == "attention_mask" else ""),
                "export the model with it",
            )
        fixed = next((name for name, (_, axes) in inputs.items() if any(type(axis) is int for axis in axes)), None)
        if fixed:
            axes = " x ".join(map(str, inputs[fixed][1]))
            raise UnusableError(
                f"the graph's input '{fixed}' is {axes}, and batches and texts of other sizes do not fit",
                "export the model with dynamic axes for batch and sequence",
            )
        self.answer = find_outputs(outputs, auto_class)

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Makes the graph's inputs from a batch, in the types that the graph wants."""
        types = batch.get("token_type_ids")
        reads = "token_type_ids" in self.meanings.values()
        if not reads and types is not None and types.any() and (self.config.get("type_vocab_size") or 0) > 1:
            raise UnusableError(
                "the graph takes no 'token_type_ids', and without them it cannot tell the two texts of a pair apart",
                "export the model with it",
            )
        made = {meaning: make_input(str(meaning), batch, self.config) for meaning in set(self.meanings.values())}
        return {name: made[meaning].astype(self.inputs[name]) for name, meaning in self.meanings.items()}

    def pick_logits(self, outputs: dict[str, Any]) -> Any:
        """Picks the logits from the outputs; stacks the start and end logits of a span head in the last axis."""
        found = [np.asarray(outputs[name], np.float32) for name in self.answer]
        return found[0] if len(found) == 1 else np.stack(found, axis=-1)

    def use_threads(self, threads: int) -> None:
        """Does nothing: the threads were set when the graph was loaded."""

    def computing_type(self) -> str | None:
        """Returns the type that it computes in if its runtime chooses that; else None."""
        return None

    def finish(self) -> None:
        """Does nothing: a graph's answer is complete when the call returns."""

    def device_peak(self) -> int | None:
        """Returns None: graphs run on the CPU."""
        return None


class OnnxModel(GraphModel):
    """A graph that onnxruntime runs."""

    def __init__(self, path: str, threads: int, auto_class: str, graph: str = "model.onnx", **_: Any) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # A thread pool that spins slows the other models, and looks faster than it is.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        file = str(Path(path) / graph)
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.names = [node.name for node in self.session.get_outputs()]
        inputs = {node.name: (ONNX_KINDS.get(node.type, "int64"), node.shape) for node in self.session.get_inputs()}
        self.take(path, inputs, self.names, auto_class)

    def __call__(self, batch: dict[str, Any]) -> Any:
        return self.pick_logits(dict(zip(self.answer, self.session.run(self.answer, batch), strict=True)))


class OpenVinoModel(GraphModel):
    """A graph that OpenVINO runs as `OVModel` does by default: in bfloat16 where the processor can.

    With `dtype="float32"` it computes float operators in float32.
    """

    def __init__(
        self, path: str, threads: int, auto_class: str, graph: str = "openvino_model.xml", dtype: str | None = None,
        **_: Any,
    ) -> None:  # fmt: skip
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        options |= {"INFERENCE_PRECISION_HINT": "f32"} if dtype == "float32" else {}
        compiled = openvino.Core().compile_model(Path(path) / graph, "CPU", options)
        self.compiled, self.request = compiled, compiled.create_infer_request()
        inputs = {
            node.get_any_name(): (
                node.get_element_type().to_dtype().name,
                [axis.get_length() if axis.is_static else None for axis in node.get_partial_shape()],
            )
            for node in compiled.inputs
        }
        self.take(path, inputs, [node.get_any_name() for node in compiled.outputs], auto_class)

    def __call__(self, batch: dict[str, Any]) -> Any:
        return self.pick_logits({node.get_any_name(): value for node, value in self.request.infer(batch).items()})

    def computing_type(self) -> str:
        """Finds the types of the compiled graph, which OpenVINO chooses by the processor.

        Returns:
            The type of most linear layers' products. If that is `int8` and the other operators are not in float32,
            their type too: `int8 and bfloat16`.
        """
        floats = FLOATS[self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()]
        facts = [node.get_rt_info() for node in self.compiled.get_runtime_model().get_ops()]
        # Such as `brgemm_avx512_bf16`; `runtimePrecision` would be the type of the weights.
        kernels = [x["primitiveType"].astype(str) for x in facts if x["layerType"].astype(str) == "FullyConnected"]
        if 2 * sum(kernel.lower().endswith(("_i8", "_u8")) for kernel in kernels) <= len(kernels):
            return floats
        return "int8" if floats == "float32" else f"int8 and {floats}"


RUNTIMES: dict[str, Any] = {"torch": TorchModel, "onnx": OnnxModel, "openvino": OpenVinoModel}
IMPORTS = {"torch": ("torch", "transformers"), "onnx": ("onnxruntime",), "openvino": ("openvino",)}
"""The packages of each runtime."""


ONNX_KINDS = {
    "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool", "tensor(float)": "float32",
    "tensor(float16)": "float16",
}  # fmt: skip
FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""OpenVINO's names of types."""
MEANINGS = {
    "input_ids": ("input_ids", "input_word_ids"),
    "attention_mask": ("attention_mask", "input_mask"),
    "token_type_ids": ("token_type_ids", "segment_ids", "input_type_ids"),
    "position_ids": ("position_ids",),
}
"""The inputs of a model, and their names in the graphs of different exporters."""
PADDING_OFFSET = ("camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta",
                  "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")  # fmt: skip
"""Architectures that number the real tokens from the padding id plus one."""
HIDDEN = ("last_hidden_state", "hidden_states", "pooler_output", "sentence_embedding", "token_embeddings")
"""Names of outputs that are not logits."""


class UnusableError(ValueError):
    """The model cannot be measured as it is; `fix` says how to change that."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def read_config(path: str) -> dict[str, Any]:
    """Reads the config.json of a model directory, which the client has checked."""
    config: dict[str, Any] = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    return config


def run_file(file: str) -> dict[str, Any]:
    """Runs a file beside this one by its path, because hfcompress is not imported, and returns its names."""
    return runpy.run_path(str(Path(__file__).parent / file))


def find_meaning(name: str) -> str | None:
    """Finds the meaning of a graph's input by its name; None if the name is unknown."""
    bare = name.removesuffix(":0")  # as TensorFlow's exporter writes names
    return next((meaning for meaning, names in MEANINGS.items() if bare in names), None)


def make_input(meaning: str, batch: dict[str, Any], config: dict[str, Any]) -> Any:
    """Makes an input from a batch: token types that the tokenizer left out are 0, and positions are counted."""
    if meaning in batch:
        return batch[meaning]
    ids = batch["input_ids"]
    if meaning == "token_type_ids":
        return np.zeros_like(ids)
    if meaning != "position_ids":
        raise UnusableError(f"the graph needs '{meaning}', and the tokenizer does not give it", "use its own tokenizer")
    if config.get("model_type") in PADDING_OFFSET:
        padding = config.get("pad_token_id", 1) or 0
        real = (ids != padding).astype(np.int64)
        return np.cumsum(real, axis=1) * real + padding
    return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)


def find_outputs(outputs: list[str], auto_class: str) -> list[str]:
    """Finds the outputs that are the logits, or the start and end logits of a span head, by their names."""
    names = {name.removesuffix(":0"): name for name in outputs}
    if "logits" in names:
        return [names["logits"]]
    sides = ("start_logits", "end_logits")
    if auto_class.endswith("ForQuestionAnswering") and all(side in names for side in sides):
        return [names[side] for side in sides]
    # A single output of another name must be the logits; `require_shape` checks its axes.
    if len(outputs) == 1 and not set(names) & {*HIDDEN, *sides} and not auto_class.endswith("ForQuestionAnswering"):
        return outputs
    wanted = "start_logits and end_logits" if auto_class.endswith("ForQuestionAnswering") else "logits"
    raise UnusableError(
        f"the graph's outputs are {', '.join(outputs)}, and none of them is named {wanted}",
        f"export the model with its head, as {auto_class}, with outputs that have these names",
    )


def require_shape(logits: Any, ids: Any, auto_class: str, classes: int | None) -> None:
    """Requires logits with the axes that the class of a model gives.

    Args:
        logits: The model's logits.
        ids: The token ids `(rows, length)` of the batch.
        auto_class: Such as `AutoModelForSequenceClassification`.
        classes: The size of the last axis; None if it is not known.

    Raises:
        UnusableError: for other axes.
    """
    axes = ids.shape[:1] if auto_class.endswith("ForSequenceClassification") else ids.shape
    wanted = (*axes, classes or "any")
    if logits.shape[:-1] != axes or (classes is not None and logits.shape[-1] != classes):
        raise UnusableError(
            f"it answers with {' x '.join(map(str, logits.shape))} numbers, but a model "
            f"{auto_class.removeprefix('AutoModel')} with its config.json answers with {' x '.join(map(str, wanted))}",
            "use a model with the task head of this task, and the config.json that belongs to it",
        )


def import_hfcompress(place: str) -> None:
    """Imports hfcompress, which needs not be installed, so that its models load without a flag."""
    sys.path.append(place)
    importlib.import_module("hfcompress")


def import_runtime(runtime: str, auto_class: str) -> None:
    """Imports the packages of a runtime, and the module of a model's class, which transformers imports late."""
    modules = [importlib.import_module(name) for name in IMPORTS[runtime]]
    if runtime == "torch":
        getattr(modules[-1], auto_class, None)


def resident_peak() -> int:
    """Reads the peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count the parent's memory, as it was at the fork
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_usage() -> dict[str, Any]:
    """Reads the processor time of this process so far.

    Returns:
        In seconds: `wall`, the clock; `cpu`, of all threads; `queued`, the time of each thread in the run queue (None
        if the system does not show it). And `involuntary`, the number of involuntary context switches.
    """
    import resource

    return {
        "wall": time.perf_counter(),
        "cpu": time.process_time(),
        "queued": read_run_queue(),
        "involuntary": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
    }


def read_run_queue(process: Path = Path("/proc/self")) -> dict[str, float] | None:
    """Reads the seconds that each thread of a process was in the run queue: ready to run, without a processor.

    `/proc/self/schedstat` has the main thread only, so the file of each thread is read.
    """
    found = {}
    for file in process.glob("task/*/schedstat"):
        try:
            found[file.parent.name] = int(file.read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):  # a thread that ended meanwhile
            continue
    return found or None


def subtract_usage(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Subtracts two results of `read_usage`; `waited` is the queue time of the thread that waited longest.

    The threads of an operator wait for one another, so the thread that waits longest holds up the model. A mean over
    many threads would hide it.
    """
    first, last = before["queued"], after["queued"]
    waited = max(seconds - first.get(thread, 0.0) for thread, seconds in last.items()) if first and last else None
    return {
        "wall": after["wall"] - before["wall"],
        "cpu": after["cpu"] - before["cpu"],
        "waited": waited,
        "involuntary": after["involuntary"] - before["involuntary"],
    }


def read_batches(path: str) -> list[dict[str, Any]]:
    """Reads the batches of an .npz file whose entries are named `index/input`."""
    found: dict[int, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for entry in arrays.files:
            index, _, name = entry.partition("/")
            found.setdefault(int(index), {})[name] = arrays[entry]
    return [found[index] for index in sorted(found)]


def reduce_logits(logits: Any, batch: dict[str, Any], head: str) -> Any:
    """Reduces a batch's logits to the numbers that the metric needs, without padding.

    Args:
        logits: `(rows, C)` for a sequence head, `(rows, length, C)` for any other.
        batch: Its arrays: `attention_mask`; for a mask head also `labels`, -100 for tokens that are not masked.
        head: The kind of task head: `sequence`, `token`, `span` or `mask`.

    Returns:
        For a sequence head the logits unchanged; for a token or span head `(real tokens, C)`, row after row; for a mask
        head `(rows, 3)`: the number of masked tokens, the number of right ones, and the sum of their `-log p`.
    """
    if head == "sequence":
        return logits
    if head != "mask":
        return logits[batch["attention_mask"].astype(bool)]
    asked = batch["labels"] != -100
    scores, expected = logits[asked].astype(np.float64), batch["labels"][asked]
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    loss = np.log(np.exp(scores - top).sum(-1)) + top[:, 0] - np.take_along_axis(scores, expected[:, None], -1)[:, 0]
    found = np.stack([np.ones(len(expected)), scores.argmax(-1) == expected, loss], axis=-1)
    sums = np.zeros((len(logits), 3))
    np.add.at(sums, np.nonzero(asked)[0], found)
    return sums


def collect_scores(pipeline: str, answers: list[dict[str, Any]]) -> dict[str, float]:
    """Collects a pipeline's scores; the keys are labels, `position label` of tokens, or ids of tokens for a mask."""
    key = {
        "text-classification": lambda answer: answer["label"],
        "token-classification": lambda answer: f"{answer['index']} {answer['entity']}",
        "fill-mask": lambda answer: str(answer["token"]),
    }[pipeline]
    return {key(answer): float(answer["score"]) for answer in answers}


class Worker:
    """Answers requests; it holds one model."""

    model: Any

    def load(
        self, runtime: str, auto_class: str, head: str = "sequence", classes: int | None = None, **options: Any
    ) -> dict[str, Any]:
        start = time.perf_counter()
        import_runtime(runtime, auto_class)
        imported = time.perf_counter()
        self.head, self.auto_class, self.classes = head, auto_class, classes
        self.model = RUNTIMES[runtime](auto_class=auto_class, **options)
        return {
            "parameters": self.model.parameters,
            "loading": self.model.loading,
            "computing_type": self.model.computing_type(),
            "import_seconds": imported - start,
            "load_seconds": time.perf_counter() - imported,
            "pid": os.getpid(),
        }

    def logits(self, inputs: str, output: str) -> dict[str, Any]:
        np.save(output, np.concatenate([self._answer(batch) for batch in read_batches(inputs)]))
        return {}

    def _answer(self, batch: dict[str, Any]) -> Any:
        tokens = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.model(self.model.place(tokens))
        require_shape(logits, batch["input_ids"], self.auto_class, self.classes)
        return reduce_logits(logits, batch, self.head)

    def read(
        self, path: str, texts: list[list[str]], truncation: str | bool, max_length: int, pipeline: str | None
    ) -> dict[str, Any]:
        """Encodes texts (or pairs) with the tokenizer of a directory, and runs a pipeline on them.

        Args:
            path: The directory.
            texts: One or two strings each.
            truncation, max_length: Arguments of the tokenizer.
            pipeline: The pipeline's name; None for no pipeline.

        Returns:
            `encoded`, the tokenizer's output for each text; `answers`, the scores for each text (see `collect_scores`),
            or None if this transformers has no such pipeline.
        """
        from transformers import AutoTokenizer
        from transformers.pipelines import PIPELINE_REGISTRY

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        encoded = [dict(tokenizer(*text, truncation=truncation, max_length=max_length)) for text in texts]
        if pipeline is None or pipeline not in PIPELINE_REGISTRY.get_supported_tasks():
            return {"encoded": encoded, "answers": None}
        return {"encoded": encoded, "answers": self._run_pipeline(pipeline, tokenizer, texts, max_length)}

    def _run_pipeline(
        self, name: str, tokenizer: Any, texts: list[list[str]], max_length: int
    ) -> list[dict[str, float]]:
        import transformers

        model = self.model.model
        placed = {} if hasattr(model, "hf_device_map") else {"device": model.device}
        pipe = transformers.pipeline(name, model=model, tokenizer=tokenizer, **placed)
        options: dict[str, dict[str, Any]] = {
            "text-classification": {"top_k": None, "truncation": True, "max_length": max_length},
            "token-classification": {"ignore_labels": []},
            "fill-mask": {"top_k": 5},
        }
        inputs = [dict(zip(("text", "text_pair"), text, strict=False)) if len(text) > 1 else text[0] for text in texts]
        return [collect_scores(name, pipe(text, **options[name])) for text in inputs]

    def prepare(self, inputs: str) -> dict[str, Any]:
        self.batches = [self.model.place(batch) for batch in read_batches(inputs)]
        for batch in [*self.batches[:3], max(self.batches, key=lambda b: b["input_ids"].shape[1])]:
            self.model(batch)
        return {}

    def time(self, threads: int, most: int | None = None) -> dict[str, Any]:
        self.model.use_threads(threads)
        # This call is not timed: threads start again, and the caches hold another model.
        self.model(self.batches[0])
        self.model.finish()
        seconds, before = [], read_usage()
        for batch in self.batches[:most]:
            start = time.perf_counter()
            self.model(batch)
            self.model.finish()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, **subtract_usage(before, read_usage())}

    def sustain(self, threads: int, seconds: float) -> dict[str, Any]:
        """Runs the prepared batches again and again for some seconds, the one at hand to its end."""
        self.model.use_threads(threads)
        self.model(self.batches[0])
        self.model.finish()
        rows, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            batch = self.batches[rows // len(self.batches[0]["input_ids"]) % len(self.batches)]
            self.model(batch)
            self.model.finish()
            rows += len(batch["input_ids"])
        return {"rows": rows, "seconds": time.perf_counter() - start}

    def memory(self) -> dict[str, Any]:
        return {"process": resident_peak(), "device": self.model.device_peak()}

    def run_for(self, seconds: float) -> dict[str, Any]:
        """Runs the prepared batches over and over, for at least some seconds, and counts the rows."""
        rows, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for batch in self.batches:
                self.model(batch)
                rows += len(batch["input_ids"])
            self.model.finish()
        return {"rows": rows, "seconds": time.perf_counter() - start}


def answer(worker: Worker, line: str) -> str:
    """Answers a request, one line of JSON, with another line of JSON."""
    request = json.loads(line)
    try:
        found = {"ok": True, **getattr(worker, request.pop("do"))(**request)}
    except Exception as error:
        # Only an unexpected error shows its type.
        kind = "" if isinstance(error, UnusableError) else f"{type(error).__name__}: "
        found = {"ok": False, "error": f"{kind}{error}", "fix": getattr(error, "fix", "")}
    return json.dumps(found) + "\n"


def main() -> None:
    """Answers requests until standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not write into the answers
    worker = Worker()
    for line in sys.stdin:
        answers.write(answer(worker, line))
        answers.flush()


if __name__ == "__main__":
    main()
