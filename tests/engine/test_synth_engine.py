"""Synthetic models through the real engine: the demo speaks, every family loads, decodes and routes.

The engine runs in a child: this file is also the child's script. It uses the low-level bindings alone, so
that a fault in the models shows apart from a fault in our own session.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from qnext.engine.llama.quantize import quantise_rows
from qnext.models.synth import DEMO_SENTENCE, SHAPES, make_demo, synthesise
from qnext.models.synth.blocks import quantise_q8_0
from qnext.models.synth.demo import DEMO_WORDS

ROOT = Path(__file__).parents[2]
TINY = [name for name in SHAPES if name.startswith("tiny")]
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEXT = "Mixture-of-experts models route each token: “größer”, 東京, 3.14 and\n\tmore. " * 4


@dataclass(frozen=True)
class Job:
    """One decode: greedy tokens from `prompt`, or a dry load when `generate` is 0."""

    model: str
    prompt: str = ""
    generate: int = 16
    kv_type: int = 1
    threads: int = 1
    watch_routing: bool = False


def run_jobs(*jobs: Job) -> list[dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, __file__, json.dumps([asdict(job) for job in jobs])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.engine
def test_the_demo_says_its_sentence_to_any_prompt_in_any_setting(tmp_path: Path) -> None:
    model = tmp_path / "demo.gguf"
    make_demo(model)
    f16, q8_0 = 1, 8
    jobs = [
        Job(str(model), CHAT.format("Hello"), 64, f16, threads=2),
        Job(str(model), CHAT.format("Qwen3 works"), 64, q8_0),
        Job(str(model), "Tell me", 64, f16),
        Job(str(model), "東京", 64, f16),
    ]
    for answer in run_jobs(*jobs):
        assert answer["text"] == DEMO_SENTENCE
        assert answer["stopped"]
        assert answer["tokens"] == len(DEMO_WORDS)
        assert answer["margin"] > 20


@pytest.mark.engine
def test_the_demo_routes_to_every_expert_and_reads_its_sentence_word_by_word(tmp_path: Path) -> None:
    model = tmp_path / "demo.gguf"
    make_demo(model)
    (answer,) = run_jobs(Job(str(model), DEMO_SENTENCE + TEXT, 1, watch_routing=True))
    assert answer["pieces"][: len(DEMO_WORDS)] == list(DEMO_WORDS)
    assert answer["round_trip"] == DEMO_SENTENCE + TEXT
    assert set(answer["experts_seen"].values()) == {8}


@pytest.mark.thorough
@pytest.mark.engine
def test_every_tiny_family_decodes_finite_numbers_and_routes_to_every_expert(tmp_path: Path) -> None:
    jobs = []
    for name in TINY:
        path = tmp_path / f"{name}.gguf"
        synthesise(name, path, quant="Q4_K_M", quantizer=quantise_rows)
        jobs.append(Job(str(path), TEXT * 2, 2, watch_routing=True))
    for name, answer in zip(TINY, run_jobs(*jobs), strict=True):
        assert answer["finite"], name
        assert answer["round_trip"] == TEXT * 2, name
        # The last layer is computed for the last token alone, so it says nothing of how routing spreads.
        seen = list(answer["experts_seen"].values())[:-1]
        assert seen == [16] * len(seen), name
        assert len(seen) == (SHAPES[name].layers - 1 if SHAPES[name].experts else 0), name


@pytest.mark.thorough
@pytest.mark.engine
def test_the_engine_accepts_the_header_of_every_true_shape(tmp_path: Path) -> None:
    names = [name for name in SHAPES if name not in TINY]
    for name in names:
        synthesise(name, tmp_path / f"{name}.gguf", quant="Q4_K_M", header_only=True)
    answers = run_jobs(*(Job(str(tmp_path / f"{name}.gguf"), generate=0) for name in names))
    parameters = {name: answer["parameters"] / 1e9 for name, answer in zip(names, answers, strict=True)}
    assert parameters["qwen3-next-80b-a3b"] == pytest.approx(79.67, abs=0.01)
    assert parameters["qwen3-next-80b-a3b"] == parameters["qwen3-next-80b-a3b-fused"]
    assert parameters["qwen3-30b-a3b"] == pytest.approx(30.53, abs=0.01)
    assert parameters["gpt-oss-20b"] == pytest.approx(20.91, abs=0.01)
    assert parameters["qwen3-4b"] == pytest.approx(4.02, abs=0.01)


@pytest.mark.engine
def test_ggml_quantises_within_each_types_error_and_our_q8_0_is_its() -> None:
    import gguf
    import numpy as np

    rows = np.random.default_rng(0).standard_normal((4, 512)).astype("f4")
    for name, error in (("Q4_K", 0.1), ("Q6_K", 0.03), ("MXFP4", 0.2), ("IQ4_XS", 0.12), ("IQ2_XXS", 0.5)):
        data = np.frombuffer(quantise_rows(rows, name), "u1").reshape(4, -1)
        back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
        assert np.sqrt(((back - rows) ** 2).mean()) < error, name
    assert quantise_rows(rows, "Q8_0") == quantise_q8_0(rows)


class _Engine:
    """The child's side: llama.cpp by ctypes, watching router probabilities as they are computed."""

    def __init__(self) -> None:
        import ctypes

        import llama_cpp

        self.api: Any = llama_cpp
        folder = Path(llama_cpp.__file__).parent / "lib"
        found = [
            path for name in ("libggml-base.so.0", "libggml-base.dylib") if (path := folder / name).exists()
        ]
        self.ggml = ctypes.CDLL(str(found[0]))
        self.ggml.ggml_get_name.restype = ctypes.c_char_p
        self.ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        self.ggml.ggml_nbytes.restype = ctypes.c_size_t
        self.ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
        size = ctypes.c_size_t
        self.ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, size, size]
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self.watch)
        self.probabilities: dict[str, list[Any]] = {}

    def watch(self, tensor: int, ask: bool, _: object) -> bool:
        import numpy as np

        name = self.ggml.ggml_get_name(tensor).decode()
        kind, _, layer = name.partition("-")
        if kind not in ("ffn_moe_probs", "ffn_moe_logits_biased") or not layer.isdigit():
            return not ask
        if not ask:
            values = np.empty(self.ggml.ggml_nbytes(tensor) // 4, "f4")
            self.ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            self.probabilities.setdefault(layer, []).append(values)
        return True

    def run(self, job: Job) -> dict[str, Any]:
        api = self.api
        params = api.llama_model_default_params()
        params.use_extra_bufts = False
        if not job.generate:
            params.no_alloc = True
            params.load_mode = api.LLAMA_LOAD_MODE_NONE
        model = api.llama_model_load_from_file(job.model.encode(), params)
        assert model, job.model
        try:
            if not job.generate:
                return {"parameters": api.llama_model_n_params(model)}
            settings = api.llama_context_default_params()
            settings.n_ctx = settings.n_batch = 1024
            settings.n_threads = settings.n_threads_batch = job.threads
            settings.flash_attn_type = 1
            settings.type_k = settings.type_v = job.kv_type
            self.probabilities = {}
            if job.watch_routing:
                settings.cb_eval = self.callback
            context = api.llama_init_from_model(model, settings)
            assert context, job.model
            answer = self._generate(api.llama_model_get_vocab(model), context, job)
            api.llama_free(context)
            return answer | {"experts_seen": self._experts_seen(SHAPES.get(Path(job.model).stem))}
        finally:
            api.llama_model_free(model)

    def _generate(self, vocabulary: Any, context: Any, job: Job) -> dict[str, Any]:
        import numpy as np

        api = self.api
        size = api.llama_vocab_n_tokens(vocabulary)
        text = job.prompt.encode()
        buffer = (api.llama_token * 4096)()
        count = api.llama_tokenize(vocabulary, text, len(text), buffer, 4096, False, True)
        prompt = batch = list(buffer[:count])
        out: list[int] = []
        finite, margin, stopped = True, float("inf"), False
        while len(out) < job.generate and not stopped:
            tokens = (api.llama_token * len(batch))(*batch)
            assert api.llama_decode(context, api.llama_batch_get_one(tokens, len(batch))) == 0
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (size,))
            finite = finite and bool(np.isfinite(logits).all())
            second, first = np.partition(logits, -2)[-2:]
            margin = min(margin, float(first - second))
            batch = [int(logits.argmax())]
            stopped = api.llama_vocab_is_eog(vocabulary, batch[0])
            if not stopped:
                out += batch
        pieces = [self._piece(vocabulary, token) for token in prompt]
        return {
            "text": b"".join(self._piece(vocabulary, token) for token in out).decode(errors="replace"),
            "pieces": [piece.decode(errors="replace") for piece in pieces],
            "round_trip": b"".join(pieces).decode(),
            "tokens": len(out),
            "finite": finite,
            "margin": margin,
            "stopped": bool(stopped),
        }

    def _piece(self, vocabulary: Any, token: int) -> bytes:
        import ctypes

        buffer = ctypes.create_string_buffer(256)
        length = self.api.llama_token_to_piece(vocabulary, token, buffer, 256, 0, True)
        return buffer.raw[:length]

    def _experts_seen(self, shape: Any) -> dict[str, int]:
        """Layer to the number of experts chosen at least once."""
        import numpy as np

        experts, used = (shape.experts, shape.used) if shape else (8, 2)
        return {
            layer: len(np.unique(np.argsort(-np.concatenate(parts).reshape(-1, experts), axis=1)[:, :used]))
            for layer, parts in self.probabilities.items()
        }


if __name__ == "__main__":
    engine = _Engine()
    for fields in json.loads(sys.argv[1]):
        print(json.dumps(engine.run(Job(**fields))), flush=True)
