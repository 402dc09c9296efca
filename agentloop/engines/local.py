"""A transformers model on the CPU or one GPU, many requests at a time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch

from agentloop.engines.base import Engine, Generation, Sampling, Weights, check_ids, check_sampling
from agentloop.engines.local_batch import Batch, Request
from agentloop.engines.local_cache import ATTENTION, Fill, SlotCache
from agentloop.errors import ConfigError, EngineError, nearest
from agentloop.iterate import each

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_SLOTS = 256
CPU_CACHE_BYTES = 1 << 30
"""What `max_slots="auto"` lets the keys and values take on a CPU; on a GPU it is half of what is free."""


class LocalEngine(Engine):
    """Generates with a transformers causal language model in this process.

    Requests join and leave the running batch at every step; the forwards run in a thread of their own, so the event loop
    stays free. Keys and values of a trajectory are kept from one turn to the next. A request with a seed gets the same
    tokens whoever else is in the batch (up to float noise: an input that is batched otherwise is summed in another order).
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        max_slots: int | Literal["auto"] = "auto",
        max_len: int | None = None,
        stop_token_ids: Sequence[int] | None = None,
        weight_version: int = 0,
        threads: int | None = None,
        entropies: bool = False,
    ) -> None:
        """`model` belongs to the engine from now on: it is put into evaluation mode and its attention is replaced by one
        that gives the same results (checked here on a few tokens).

        `tokenizer` is needed for stop strings only. `max_slots`: sequences in memory at a time, running ones and ones kept
        for their next turn. `max_len`: tokens of input and output together; default: the model's own limit.
        `stop_token_ids`: what ends a generation whose `Sampling` names none; default: the end-of-sequence tokens of the
        model's generation config, else of the tokenizer. `threads` sets torch's thread count for the whole process.
        `entropies` has each answer tell the entropy that each of its tokens was sampled with.

        Raises `ConfigError` for a model that does not keep plain keys and values of every token (sliding windows,
        linear attention, compressed caches, encoder-decoders).
        """
        if threads is not None:
            torch.set_num_threads(threads)
        _refuse(model.config)
        limit = getattr(model.config, "max_position_embeddings", None) or 4096
        self.max_len = limit if max_len is None else max_len
        if not 2 <= self.max_len <= limit:
            raise ConfigError(f"max_len is {self.max_len}; the model takes between 2 and {limit} tokens")
        if max_slots != "auto" and max_slots < 1:
            raise ConfigError(f"max_slots is {max_slots}; it must be at least 1, or 'auto'")
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        self.stop_token_ids = frozenset(_default_stops(model, tokenizer) if stop_token_ids is None else stop_token_ids)
        _take_over(model, self._new_cache)
        self.max_slots = self._affordable_slots() if max_slots == "auto" else max_slots
        self._batch = Batch(
            model,
            self._new_cache,
            max_slots=self.max_slots,
            max_len=self.max_len,
            version=weight_version,
            decode_text=None if tokenizer is None else _text_decoder(tokenizer),
            entropies=entropies,
        )
        self._asleep: set[str] = set()
        self._home = model.device
        self._inbox: list[Callable[[], None]] = []
        self._signal = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._stopped = False

    @classmethod
    def load(
        cls,
        model_path: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_slots: int | Literal["auto"] = "auto",
        max_len: int | None = None,
        stop_token_ids: Sequence[int] | None = None,
        weight_version: int = 0,
        threads: int | None = None,
        entropies: bool = False,
    ) -> LocalEngine:
        """Load model and tokenizer from a folder or by a hub name. Raises `ConfigError` if that fails; a folder without a
        tokenizer is fine."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype '{dtype}': {nearest(dtype, DTYPES)}")
        try:
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=DTYPES[dtype], attn_implementation="sdpa")
            model = model.to(device)
        except (OSError, ValueError, RuntimeError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(f"the model '{model_path}' cannot be loaded: {reason}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # what transformers raises where there is none
            tokenizer = None
        return cls(
            model,
            tokenizer=tokenizer,
            max_slots=max_slots,
            max_len=max_len,
            stop_token_ids=stop_token_ids,
            weight_version=weight_version,
            threads=threads,
            entropies=entropies,
        )

    @property
    def weight_version(self) -> int:
        return self._batch.version

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return self._batch.running

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self._batch.waiting

    @property
    def kept(self) -> int:
        """Trajectories between turns whose keys and values are kept."""
        return self._batch.kept

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        self._check_open()
        check_sampling(sampling)
        own = check_ids(ids, self._vocabulary)
        if len(own) >= self.max_len:
            raise EngineError(f"the input has {len(own)} tokens; with max_len {self.max_len} it may have {self.max_len - 1}")
        if sampling.stop and self._tokenizer is None:
            raise EngineError("stop strings need a tokenizer, and this engine has none")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Generation] = loop.create_future()
        stops = frozenset(sampling.stop_token_ids) or self.stop_token_ids
        request = Request(own, sampling, trajectory_id, stops, lambda result: _post(loop, future, result))
        self._submit(lambda: self._batch.submit(request))
        try:
            return await future
        except asyncio.CancelledError:
            if not self._closed:
                self._submit(lambda: self._batch.cancel(request))
            raise

    async def score(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        self._check_open()
        if temperature <= 0:
            raise EngineError(f"temperature is {temperature}; to score it must be positive")
        own = check_ids(ids, self._vocabulary)
        if len(own) > self.max_len:
            raise EngineError(f"the input has {len(own)} tokens; max_len is {self.max_len}")
        return await self._ask(lambda: self._batch.score(own, temperature))

    async def release(self, trajectory_id: str) -> None:
        if self._thread is not None and not self._closed:
            self._submit(lambda: self._batch.release(trajectory_id))

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Copies everything beside the model first, so that an error leaves the old weights whole and the source may reuse
        its buffers. Running requests go on with the new weights from their next token, on the keys and values that they
        have; these are used no further afterwards. Tied tensors may come under either name or both."""
        self._check_open(asleep=True)
        targets = self._tensors()
        staged: dict[str, torch.Tensor] = {}
        async for name, tensor in each(weights):
            target = targets.get(name)
            if target is None:
                raise EngineError(f"the model has no weight '{name}': {nearest(name, targets)}")
            if target.shape != tensor.shape:
                raise EngineError(f"the weight '{name}' has shape {[*target.shape]} and was given {[*tensor.shape]}")
            copy = tensor.detach().to(device=target.device, dtype=target.dtype, copy=True)
            staged[name] = copy
            if copy.numel() > 1 << 20:
                await asyncio.sleep(0)
        for name, other in _tied(staged, targets):
            if not torch.equal(staged[name], staged[other]):
                raise EngineError(f"the weights '{name}' and '{other}' are one tensor in this model and were given two values")
        await self._ask(lambda: self._batch.set_weights(staged, targets, version))

    async def weight_checksums(self, names: Sequence[str] | None = None) -> dict[str, int]:
        """Exact, of the model's own tensors, between two steps. Experts under their published names, or as transformers fuses
        them if they are asked for so; tied tensors under each of their names."""
        from agentloop.weights.checksum import checksum

        self._check_open(asleep=True)
        tensors = self._tensors()
        if names is None:
            wanted = [name for name in tensors if f"{name.rpartition('.')[0]}.0.down_proj.weight" not in tensors]
        else:
            wanted = [name for name in names if name in tensors]
        return await self._ask(lambda: {name: checksum(tensors[name]) for name in wanted})

    async def weight_fingerprints(self) -> dict[str, str]:
        """Checksums of the model's tensors as transformers has them, experts fused and tied tensors once."""
        from agentloop.weights.checksum import checksum

        self._check_open(asleep=True)
        saved = self._model.state_dict().keys()
        tensors = dict(self._model.named_parameters())
        tensors |= {name: tensor for name, tensor in self._model.named_buffers() if name in saved}
        return await self._ask(lambda: {name: f"{checksum(tensor):08x}" for name, tensor in tensors.items()})

    async def abort_all(self) -> None:
        if self._thread is not None and not self._closed:
            await self._ask(self._batch.abort_all)

    async def abort(self, trajectory_id: str) -> None:
        """`abort_all` for the requests of one trajectory."""
        if self._thread is not None and not self._closed:
            await self._ask(lambda: self._batch.abort_all(trajectory_id))

    async def pause(self) -> None:
        await self._ask(lambda: setattr(self._batch, "paused", True))

    async def resume(self) -> None:
        await self._ask(lambda: setattr(self._batch, "paused", False))

    async def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Aborts what runs. `kv_cache` frees the keys and values; `weights` moves the model to main memory if it is on a
        GPU."""
        self._check_tags(tags)
        self._asleep.update(tags)

        def fall_asleep() -> None:
            self._batch.abort_all()
            if "kv_cache" in tags:
                self._batch.free_cache()
            if "weights" in tags and self._home.type != "cpu":
                self._batch.forget()
                self._model.to("cpu")
                torch.cuda.empty_cache()

        await self._ask(fall_asleep)

    async def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        self._check_tags(tags)
        if "weights" in tags and self._home.type != "cpu":
            await self._ask(lambda: self._model.to(self._home))
        self._asleep.difference_update(tags)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True

        def stop() -> None:
            self._batch.fail_all(EngineError("the engine was closed"))
            self._stopped = True

        if self._thread is not None:
            self._submit(stop)
            await asyncio.to_thread(self._thread.join)
        self._batch.free_cache()

    # The thread

    def _submit(self, command: Callable[[], None]) -> None:
        """Run `command` in the engine's thread, between two steps."""
        with self._signal:
            self._inbox.append(command)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="agentloop-local-engine", daemon=True)
                self._thread.start()
            self._signal.notify()

    async def _ask(self, function: Callable[[], T]) -> T:
        """`_submit`, and wait for the result."""
        if self._closed:
            raise EngineError("the engine is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def command() -> None:
            result: T | BaseException
            try:
                result = function()
            except Exception as error:
                result = error
            _post(loop, future, result)

        self._submit(command)
        return await future

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._stopped:
                with self._signal:
                    while not self._inbox and not self._batch.busy:
                        self._signal.wait()
                    commands, self._inbox = self._inbox, []
                for command in commands:
                    self._batch.guard(command)
                if self._batch.busy:
                    self._batch.guard(self._batch.step)

    # Small parts

    def _new_cache(self, slots: int) -> SlotCache:
        config = self._model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if getattr(config, "kv_lora_rank", None):  # latent attention, whose `head_dim` is that of its rotary part
            dim = max(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return SlotCache(
            config.num_hidden_layers,
            heads,
            dim,
            max_slots=slots,
            max_len=self.max_len,
            dtype=self._model.dtype,
            device=self._model.device,
        )

    def _affordable_slots(self) -> int:
        room = CPU_CACHE_BYTES
        if self._model.device.type == "cuda":
            room = torch.cuda.mem_get_info(self._model.device)[0] // 2
        return min(max(room // (self._new_cache(1).bytes_per_token() * self.max_len), 1), MOST_SLOTS)

    def _check_open(self, *, asleep: bool = False) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        if self._asleep and not asleep:
            raise EngineError(f"the engine sleeps ({', '.join(sorted(self._asleep))})")

    def _check_tags(self, tags: Sequence[str]) -> None:
        for tag in tags:
            if tag not in ("weights", "kv_cache"):
                raise EngineError(f"unknown tag '{tag}': {nearest(tag, ('weights', 'kv_cache'))}")

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What `update_weights` may name; tied tensors under each of their names, and the experts of a mixture both as
        transformers fuses them and one by one, as they are published."""
        tensors = dict(self._model.named_parameters(remove_duplicate=False))
        saved = self._model.state_dict().keys()
        tensors |= {name: tensor for name, tensor in self._model.named_buffers() if name in saved}
        return tensors | dict(_experts(tensors))


def _post(loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], result: T | BaseException) -> None:
    """Settle an asyncio future from the engine's thread."""

    def settle() -> None:
        if future.done():
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
        loop.call_soon_threadsafe(settle)


def _tied(staged: Iterable[str], targets: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of staged names that are one tensor in the model."""
    first: dict[int, str] = {}
    for name in staged:
        other = first.setdefault(id(targets[name]), name)
        if other != name:
            yield other, name


def _experts(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of transformers 5's fused experts under the names of checkpoints: `experts.gate_up_proj` [experts, 2 * width,
    hidden] and `experts.down_proj` [experts, hidden, width] hold `experts.3.gate_proj.weight`, and so on."""
    for name, tensor in tensors.items():
        start, _, kind = name.rpartition(".")
        if tensor.dim() != 3 or not start.endswith(".experts") or kind not in ("gate_up_proj", "down_proj"):
            continue
        for number, expert in enumerate(tensor.detach()):
            if kind == "down_proj":
                yield f"{start}.{number}.down_proj.weight", expert
                continue
            gate, up = expert.chunk(2)
            yield f"{start}.{number}.gate_proj.weight", gate
            yield f"{start}.{number}.up_proj.weight", up


def _text_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def _default_stops(model: Any, tokenizer: Any) -> list[int]:
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if stops is None:
        stops = getattr(model.config, "eos_token_id", None)
    if stops is None:
        stops = getattr(tokenizer, "eos_token_id", None)
    if stops is None:
        return []
    return [int(stops)] if isinstance(stops, int) else [int(stop) for stop in stops]


def _refuse(config: Any) -> None:
    """Raise `ConfigError` for what the config says that a cache of plain keys and values cannot serve."""
    name = getattr(config, "model_type", type(config).__name__)
    layers = getattr(config, "layer_types", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"the local engine serves decoders only, and {name} is an encoder-decoder")
    if layers is not None:
        odd = sorted({kind for kind in layers if kind != "full_attention"})
        if odd:
            raise ConfigError(f"the local engine serves full attention only, and {name} has layers with {', '.join(odd)}")
    elif getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        raise ConfigError(f"the local engine serves full attention only, and {name} has a sliding window")
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "num_attention_heads"):
        raise ConfigError(f"the local engine serves text decoders with key-value heads, and {name} is none")


def _take_over(model: Any, new_cache: Callable[[int], SlotCache]) -> None:
    """Switch the model to our attention, and prove on a few tokens that reading from the cache changes nothing."""
    with torch.inference_mode():
        name = model.config.model_type
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = torch.arange(1, 7, device=model.device)[None, :] * 7 % vocabulary
        expected = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
        try:
            model.set_attn_implementation(ATTENTION)
            batch = Batch(model, new_cache, max_slots=2, max_len=8, version=0, decode_text=None)
            cache = new_cache(2)
            whole = ids[0].tolist()
            filled = batch._forward(cache, [], [Fill(0, 0, 3), Fill(1, 0, 2)], whole[:3] + whole[:2])
            mixed = batch._forward(cache, [3], [Fill(1, 2, 4)], whole[3:4] + whole[2:])
        except Exception as error:
            raise ConfigError(f"the local engine cannot serve {name}: {type(error).__name__}: {error}") from error
        got = torch.log_softmax(torch.cat([filled, mixed]).float(), dim=-1)
        off = float((got - expected[[0, 1, 2, 0, 1, 3, 2, 3, 4, 5]]).abs().max())
        if not off <= (1e-3 if model.dtype == torch.float32 else 0.5):
            raise ConfigError(
                f"the local engine cannot serve {name}: with cached keys and values its logits differ by {off:.3g}"
            )
