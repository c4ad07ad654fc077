"""The library face: ``LLM`` opens a checkpoint, builds this rank's part of the model, generates.

Under a launcher every rank makes the same calls; only rank 0's requests count and results are
returned on every rank. It changes neither the caller's random state, environment, signal handlers,
root logger nor stdout. Knows no command line and no HTTP.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Literal, cast

import torch

import tprt
from tprt.checkpoint import CheckpointReader, load_weights, open_checkpoint
from tprt.distributed.failure import Failure
from tprt.distributed.tp_group import TPGroup, init_tp_group, launched_size
from tprt.distributed.vocabulary import show_ranges
from tprt.distributed.watch import Watch
from tprt.engine.control import following_key, read_records
from tprt.engine.input_processor import InputProcessor, Prompt
from tprt.engine.llm_engine import LLMEngine
from tprt.engine.outputs import RequestOutput, StreamEvent
from tprt.engine.replay import ReplayedCall, replay
from tprt.engine.sequence import Request
from tprt.engine.sequence import Sequence as EngineSequence
from tprt.engine.streaming import RequestStream
from tprt.errors import ConfigError, OutputError, PeerLost, RankMismatch
from tprt.kernels import use_kernels
from tprt.llm.arguments import pair
from tprt.llm.build import build_runner, kernels_to_compile
from tprt.llm.memory import check_memory
from tprt.llm.startup import (
    as_tprt_error,
    check_ranks_agree,
    close_record_file,
    engine_config,
    open_record_file,
    open_tokenizer,
    resolve_config,
    resolve_vocabulary,
    same_file,
    settle_collectives,
    split_options,
    start_watch,
    together,
)
from tprt.llm.timing import StartupTimes, beside, log_startup, seconds_since_start
from tprt.log import get_logger
from tprt.models import get_model_class
from tprt.sampling_params import SamplingParams
from tprt.tokenizer import check_vocab, eos_warnings

logger = get_logger(__name__)

Progress = Callable[[int, int], None]
_IMPORTED = seconds_since_start()


class LLM:
    """A model ready to generate, on this rank and its peers.

    Args:
        model: a release folder, an ``iter_*`` folder, a Hugging Face or presharded folder, or a hub id.
        tokenizer: path of the sentencepiece model; None takes the one beside the checkpoint.
        dtype: "bfloat16", "float32" or "float16".
        verify: "full" also checks checksums, "sizes" only what names and headers say.
        bos_policy: "bos" begins every text with the piece for that, "none" does not, "auto" is what the
            model was tuned on.
        trim_vocab: ids whose rows of embedding and head are not loaded and that are never sampled:
            "off" for none, as the reference, "reserved" for the block that the tokenizer proves
            unused, or ranges of a first and a last id, as ``[(3, 70002)]``. All ids keep their numbers.
        group: a process group or one-dimensional DeviceMesh to cut the model over; None is the world.
        device: where to compute; None is this rank's GPU, else the CPU.
        watch: a watch over the ranks that runs already; it stays the caller's. None starts one where
            there are several ranks: a rank that died, raised or does not move any more is then named
            by a ``PeerLost`` on all others.
        **options: the other fields of ``EngineConfig``, and those of the model's own config that users
            may set: ``rotary_precision`` (of rotary tables, "bf16" or "fp32"; "auto" takes what the
            checkpoint says, else bf16 for Megatron checkpoints and fp32 for Hugging Face folders),
            ``window_keys`` (keys of a window that a query sees, its own included).

    Attributes:
        vocabulary: which ids have rows.
        startup_times: where the start of each rank went; see ``StartupTimes.report``.

    Raises:
        ConfigError, CheckpointError, TokenizerError: before any process group is made, where names
            and headers suffice.
        RankMismatch: ranks were given different models or settings.
        OutOfMemoryPlan: no room for a KV cache.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "bfloat16",
        verify: Literal["sizes", "full"] = "sizes",
        bos_policy: Literal["auto", "none", "bos"] = "auto",
        trim_vocab: Literal["off", "reserved"] | Sequence[Sequence[int]] = "off",
        group: Any = None,
        device: torch.device | str | None = None,
        watch: Watch | None = None,
        **options: Any,
    ) -> None:
        began = time.perf_counter()
        times = StartupTimes(_IMPORTED)
        engine, overrides = split_options(options)
        self.engine_config = engine_config(dtype, engine)
        reader = open_checkpoint(str(model), verify=verify)
        self.config = resolve_config(reader, overrides)
        self.tokenizer = open_tokenizer(reader, tokenizer, bos_policy)
        self.num_valid_ids = check_vocab(
            self.tokenizer,
            self.config.vocab_size,
            self.config.vocab_padding_multiple,
            str(reader.path),
        )
        self.vocabulary = resolve_vocabulary(self.config.vocab_size, self.tokenizer, trim_vocab)
        if group is None:
            self.config.validate_parallel(launched_size())
        self.max_model_len = self.engine_config.resolve_max_model_len(self.config)

        self.tp = init_tp_group(group, device, None if watch is None else watch.progress)
        self._watch: Watch | None = None
        try:
            self._watch = self._start_watch(watch)
            self.tp.progress.enter("load")
            check_ranks_agree(self.tp, self._facts(reader))
            self.tp, self.engine_config = settle_collectives(
                self.tp, self.engine_config, self.config.hidden_size
            )
            with use_kernels(*self.engine_config.kernel_choice):
                kernels = kernels_to_compile(self.config, self.tp, self.engine_config)
                self._build(reader, times, kernels)
            self.startup_times = log_startup(self.tp, times)
            self.tp.progress.enter("idle")
        except BaseException:
            self.tp.abort()  # kernels that wait for a peer would keep the device
            self._leave_ranks(self.tp, failed=True)
            raise
        self._requests: dict[int, RequestStream] = {}
        self._stepping = False
        self._call: str | None = None  # rank 0: what is under way
        if self.vocabulary.removed:
            logger.info(
                "%d of %d ids have rows: %s are trimmed away",
                self.vocabulary.num_kept,
                self.vocabulary.size,
                show_ranges(self.vocabulary.removed),
            )
        for warning in [*reader.warnings, *eos_warnings(self.tokenizer, self.config.eos_token_id)]:
            logger.warning("%s", warning)
        logger.info(
            "%s checkpoint (TP=%d on disk) on %d x %s in %s, %s; %.1f MB read by rank 0; "
            "%s; %s kernels, %s; ready in %.1f s",
            reader.layout,
            reader.disk_tp,
            self.tp.size,
            self.tp.device.type,
            self.engine_config.dtype,
            self.config.in_words,
            reader.bytes_read / 1e6,
            self._engine.capacity,
            *self._engine.runner.bodies,
            time.perf_counter() - began,
        )

    def _start_watch(self, given: Watch | None) -> Watch | None:
        """A watch of this LLM's own, unless it was given one or is alone."""
        if self.tp.size == 1:
            return None
        if given is not None:
            self.tp.progress.group = self.tp.launch_ranks
            return None
        self.tp.progress.group = tuple(range(self.tp.size))
        this = weakref.ref(self)  # the watch must not keep what nobody uses any more

        def on_failure(_: Failure) -> None:
            # Waits on the host look at ``progress``; kernels that wait for a peer must be ended. Those
            # of now: the start may replace a communicator that hung.
            if (llm := this()) is not None:
                llm.tp.abort()

        return start_watch(self.tp, self.engine_config, on_failure)

    def _serve(self, name: str | None) -> tuple[Any, list[torch.Tensor]]:
        """On ranks above 0: ``serve``, with failures told and named."""
        try:
            return self._engine.serve(name)
        except Exception as error:
            self._name(error)
            raise

    def _name(self, error: Exception) -> None:
        """Tell the ranks of a failure of this one, and of a peer's raise the name instead.

        Raises:
            PeerLost, RankMismatch: the failure behind ``error``, which is a lost peer.
        """
        watch = self._watch
        if watch is None:
            return
        if isinstance(error, PeerLost) and watch.failure is None:
            watch.explain()
        elif self._running is not None and self._running.broken:
            watch.fail(watch.of(error, as_tprt_error(error).exit_code))
        first = watch.failure
        if isinstance(error, PeerLost) and first is not None and first.rank != self.tp.rank:
            raise first.as_error() from error

    def _leave_ranks(self, tp: TPGroup, failed: bool) -> None:
        """Take down watch and groups; nothing waits for a peer that does not answer."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close(failed or tp.progress.failure is not None)
        if tp.progress.stuck or (tp.progress.failure is not None and tp.device.type == "cuda"):
            tp.abandon()
        else:
            tp.close()

    def _build(
        self,
        reader: CheckpointReader,
        times: StartupTimes,
        compile_kernels: Callable[[], None] | None = None,
    ) -> None:
        """Load the model and make its engine; ``compile_kernels`` runs while weights come to a GPU."""
        dtype, block_size = getattr(torch, self.engine_config.dtype), self.engine_config.block_size

        def load() -> Any:
            model = get_model_class(self.config.model_type)(
                self.config,
                self.tp,
                dtype,
                self.max_model_len,
                self.vocabulary,
            ).eval()
            ahead = compile_kernels if self.tp.device.type == "cuda" else None
            with beside(ahead, self.tp.device, times.phase("warm-up")), times.phase("load"):
                times.load = load_weights(model, reader, tick=self.tp.progress.move)
            model.finish_loading()
            return model

        plan = check_memory(self.tp, self.config, self.engine_config, vocabulary=self.vocabulary)
        model = together(self.tp, load)
        runner, num_blocks = build_runner(
            model,
            self.tp,
            self.engine_config,
            plan,
            self.max_model_len,
            self.num_valid_ids,
            times.phase,
        )
        self._record_file = together(
            self.tp,
            lambda: open_record_file(self.engine_config.record_path if self.tp.rank == 0 else None),
        )
        self._running: LLMEngine | None = LLMEngine(
            runner, self.tokenizer, self.engine_config, num_blocks, self.tp, self._record_file
        )
        longest = self.max_model_len
        if runner.is_paged:
            longest = min(longest, self._running.blocks.capacity * block_size)
        self._inputs = InputProcessor(
            self.tokenizer,
            self.num_valid_ids,
            longest,
            self.engine_config.seed,
            self.vocabulary,
            self.config.max_position_embeddings,
        )

    def _facts(self, reader: CheckpointReader) -> dict[str, Any]:
        """What must be the same on every rank."""
        return {
            "model": repr(self.config),
            "layout": reader.layout,
            "checkpoint": reader.fingerprint(),
            "tokenizer": self.tokenizer.sha256,
            "engine": repr(self.engine_config),
            "num_valid_ids": self.num_valid_ids,
            "trim_vocab": str(list(self.vocabulary.removed)),
            "tprt": tprt.__version__,
            "torch": torch.__version__,
            "device": self.tp.device.type,
        }

    @property
    def _engine(self) -> LLMEngine:
        self._refuse_closed()
        assert self._running is not None
        return self._running

    def _refuse_closed(self) -> None:
        if self._running is None:
            raise ConfigError("this LLM is closed", hint="make another one")
        if self._running.broken:
            raise RankMismatch(
                "the ranks of this LLM are in different states since an earlier error or interrupt",
                hint="close it and make another one",
            )

    def make_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Turn a prompt into ids and check that it can ever fit. Local to this rank.

        Args:
            prompt: a text, ``{"prompt": text}``, ``{"prompt_token_ids": [...]}`` or
                ``{"messages": [...]}``.

        Raises:
            ConfigError: the prompt has another form, no tokens, an id out of range, or together with
                max_tokens is longer than the model or the cache allows.
        """
        return self._inputs.request(prompt, params, self._engine.num_arrivals)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; results in input order, the same on every rank.

        Args:
            prompts: one prompt or a list (see ``make_request``); ignored on ranks above 0.
            sampling_params: one for all prompts, or one for each; None means the defaults.
            progress: called on rank 0 after each step with (finished sequences, tokens so far).

        Raises:
            ConfigError: a prompt or parameter is wrong; on every rank, and nothing was generated.
            RankMismatch: the ranks are in different calls, or did not compute the same.
        """
        if self.tp.rank != 0:
            return [RequestOutput.from_json(o) for o in self._serve("generate")[0]]

        with self._leading("generate") as answer:
            added = self._add_all(prompts, sampling_params)
            everyone = [seq for sequences in added for seq in sequences]
            finished = 0
            while not self._engine.idle:
                finished += len(self._engine.step())
                if progress is not None:
                    progress(finished, sum(len(s.ids) - s.num_prompt_tokens for s in everyone))
            outputs = [self._engine.collect(sequences) for sequences in added]
            if self._engine.wants_answer:
                answer.value = [output.to_json() for output in outputs]
        return outputs

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamEvent]:
        """Complete every prompt and give out text as it comes; events on rank 0, none on the others.

        The other ranks must run through the iterator too. A reader that stops early ends the call;
        what it has not read is dropped.

        Raises:
            ConfigError, RankMismatch: as ``generate``, at the first event.
        """
        if self.tp.rank != 0:
            self._serve("stream")
            return
        with self._leading("stream"):
            added = self._add_all(prompts, sampling_params)
            streams = [RequestStream(i, sequences) for i, sequences in enumerate(added)]
            while streams:
                self._engine.step()
                yield from self._events(streams)
                streams = [stream for stream in streams if not stream.finished]
            while not self._engine.idle:
                self._engine.step()

    def _events(self, streams: Iterable[RequestStream]) -> Iterator[StreamEvent]:
        for stream in streams:
            output = self._engine.collect(stream.sequences) if stream.finished else None
            yield from stream.events(output)

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue a prompt for ``step``; returns its id. Rank 0 only; the others sit in ``follow``.

        Raises:
            ConfigError: the prompt is wrong, or this is not rank 0.
        """
        self._lead_only("add_request")
        request = self.make_request(prompt, sampling_params or SamplingParams())
        request_id = self._engine.num_arrivals
        self._requests[request_id] = RequestStream(request_id, self._engine.add(request))
        return request_id

    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has something to do: requests added that have not finished."""
        return bool(self._requests)

    def step(self) -> list[StreamEvent]:
        """Run one step of the requests added; what it brought.

        That may be nothing: a chunk of a prompt brings no token, and tokens are read one step late.
        ``has_unfinished_requests`` says whether to go on.

        Raises:
            ConfigError: this is not rank 0.
            RankMismatch: a rank is in another call, or did not compute the same.
        """
        self._lead_only("step")
        if not self._requests and self._engine.idle:
            return []
        engine = self._engine
        if not self._stepping:
            with self._naming():
                engine.begin_call("step")
            self._stepping = True
        try:
            engine.step()
        except BaseException as error:
            self._break_off(error)
            raise
        events = list(self._events(self._requests.values()))
        for request_id in [i for i, stream in self._requests.items() if stream.finished]:
            del self._requests[request_id]
        self._stop_stepping_when_idle()
        return events

    def abort(self, request_id: int) -> list[StreamEvent]:
        """End a request where it stands; its last events, with finish_reason "abort".

        An id that is unknown or has finished gives none. Raises ConfigError when not rank 0.
        """
        self._lead_only("abort")
        engine, stream = self._engine, self._requests.pop(request_id, None)
        if stream is None:
            return []
        engine.abort(stream.sequences)
        events = list(self._events([stream]))
        self._stop_stepping_when_idle()
        return events

    def _stop_stepping_when_idle(self) -> None:
        if self._stepping and not self._requests:
            try:
                while not self._engine.idle:
                    self._engine.step()
            except BaseException as error:
                self._break_off(error)
                raise
            self._engine.end_call()
            self._stepping = False

    def _lead_only(self, name: str) -> None:
        if self.tp.rank != 0:
            raise ConfigError(
                f"{name}() was called on rank {self.tp.rank}",
                hint="drive steps on rank 0 while the other ranks sit in follow()",
            )
        self._refuse_inside_call(name)

    def _add_all(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[list[EngineSequence]]:
        """Queue every prompt, or none of them when one is wrong."""
        first = self._engine.num_arrivals
        requests = [
            self._inputs.request(prompt, each, first + i)
            for i, (prompt, each) in enumerate(pair(prompts, params))
        ]
        return [self._engine.add(request) for request in requests]

    def logits(self, token_ids: Sequence[int] | None) -> torch.Tensor:
        """Logits at every position, float32 [T, vocab_size], the same on every rank.

        Ids that ``trim_vocab`` removes have -inf.

        Raises:
            ConfigError: no ids, an id out of range, or more than the model or cache can hold.
        """
        if self.tp.rank != 0:
            return torch.cat(self._serve("logits")[1])

        with self._leading("logits"):
            (seq,) = self._engine.add(self._inputs.given(token_ids), wants_logits=True)
            while not self._engine.idle:
                self._engine.step()
        return torch.cat(seq.logits)

    def score(self, token_ids: Sequence[Sequence[int]] | None) -> list[list[float | None]]:
        """Log-probability of each given id after those before it, the same on every rank.

        The head is computed a few rows at a time, so a long text needs no [T, vocab_size] memory.

        Args:
            token_ids: one list of ids per text; ignored on ranks above 0.

        Returns:
            One list per text, as long as it; its first entry is None.

        Raises:
            ConfigError: as ``logits``, for any of the texts; nothing was scored.
        """
        if self.tp.rank != 0:
            return cast(list[list[float | None]], self._serve("score")[0])

        with self._leading("score") as answer:
            if not isinstance(token_ids, list | tuple):
                raise ConfigError(
                    f"score needs a list of lists of ids, not {type(token_ids).__name__}",
                    hint="score([[5, 6, 7]])",
                )
            requests = [self._inputs.given(ids, prompt_logprobs=0) for ids in token_ids]
            sequences = [self._engine.add(request)[0] for request in requests]
            while not self._engine.idle:
                self._engine.step()
            answer.value = [
                [None, *(next(iter(e.values())).logprob for e in seq.prompt_logprobs if e)]
                for seq in sequences
            ]
        return answer.value

    @contextmanager
    def _leading(self, name: str) -> Iterator[SimpleNamespace]:
        """Rank 0's side of a call: the others get ``.value`` at its end, or the error.

        Requests added one by one are not mixed with a call. While a stream waits for its reader the
        LLM may be closed, so nothing here may hold the engine.
        """
        if self._requests:
            raise ConfigError(
                f"{name}() while {len(self._requests)} added requests are unfinished",
                hint="step() until they have finished, or abort() them",
            )
        self._refuse_inside_call(name)
        answer = SimpleNamespace(value=None)
        with self._naming():
            self._engine.begin_call(name)
        self._call = name
        try:
            yield answer
        except BaseException as error:
            self._break_off(error)
            raise
        self._call = None
        with self._naming():
            self._engine.end_call(answer.value)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """For words to the other ranks that belong to no step: a lost one is named."""
        try:
            yield
        except PeerLost as error:
            self._name(error)
            raise

    def _break_off(self, error: BaseException) -> None:
        """End the call that ``error`` leaves, here and on the other ranks."""
        self._call, self._stepping = None, False
        self._requests.clear()
        if (engine := self._running) is None:
            return
        engine.abort_all()
        if isinstance(error, PeerLost):
            self._name(error)
            return
        if isinstance(error, RankMismatch):
            return
        if engine.broken and isinstance(error, Exception):
            self._name(error)  # the others wait in a step: no record reaches them
            return
        if isinstance(error, Exception):
            with suppress(PeerLost, OutputError):  # the first error says more
                engine.end_call(error=as_tprt_error(error))
        elif isinstance(error, GeneratorExit) or self.tp.size == 1:
            engine.end_call()  # the reader of a stream has left, or an interrupt that no rank missed
        else:
            # The others may be in the middle of a step. They learn when this LLM or process ends.
            engine.broken = True

    def _refuse_inside_call(self, name: str) -> None:
        if self._call is not None:
            raise ConfigError(
                f"{name}() while {self._call}() is not over",
                hint="read a stream to its end, or close() it, before anything else",
            )

    def replay(self, path: str | Path | None) -> list[ReplayedCall]:
        """Run the steps of a file written with ``record_path`` again; the calls in it, on rank 0.

        The other ranks take part and get an empty list. At another TP size or dtype the same steps
        run; in float32 they draw the same tokens.

        Raises:
            ConfigError: the file cannot be read, is damaged, or needs another model or more memory.
        """
        if self.tp.rank != 0:
            self._serve("replay")
            return []
        with self._leading("replay"):
            recording = self.engine_config.record_path
            if recording is not None and same_file(recording, path):
                raise ConfigError(
                    "this is the file that this LLM records to: its end would never come",
                    where=str(path),
                    hint="replay it with another LLM, without record_path",
                )
            try:
                with open(str(path), "rb") as file:
                    records = read_records(file, str(path))
                    calls = replay(self._engine, records, self.num_valid_ids)
            except OSError as error:
                raise ConfigError(
                    f"the record file cannot be read: {error.strerror}",
                    where=str(path),
                    hint="a file written with engine.record_path",
                ) from error
            if calls and not calls[-1].finished:
                logger.warning(
                    "%s ends in the middle of %s(), as the file of a killed run does",
                    path,
                    calls[-1].name,
                )
        return calls

    def calling(self, name: str) -> AbstractContextManager[object]:
        """Rank 0: work of the caller's own, during which the others in ``follow`` say what goes on.

        Args:
            name: of the phase, as ``write``; peers that are asked what they do answer with it.
        """
        return self._leading(name)

    def follow(self) -> None:
        """On ranks above 0: take part in whatever rank 0 calls, until it closes.

        Raises:
            PeerLost: rank 0 has died, or does not even send heartbeats any more.
            RankMismatch: as in any call.
        """
        if self.tp.rank == 0:
            raise ConfigError(
                "rank 0 leads; only the others follow", hint="call generate on rank 0"
            )
        self._refuse_closed()
        store, key = self.tp.store, following_key(self.tp.rank)
        store.set(key, "1")
        try:
            self._serve(None)
        except PeerLost:  # the store may be lost with rank 0: to ask it could take minutes
            raise
        except BaseException:
            with suppress(RuntimeError):
                store.delete_key(key)
            raise

    def close(self) -> None:
        """Free the model and cache, and the process groups made for it. Safe to call twice.

        Raises:
            PeerLost: ranks in ``follow`` could not be told, and no call has said so before.
            OutputError: the end of the record file could not be written.
        """
        if self._running is None:
            return
        engine, self._running = self._running, None
        # A closed LLM keeps its rank and size; with the groups go their threads and sockets.
        tp, self.tp = self.tp, TPGroup(self.tp.rank, self.tp.size, self.tp.device)
        self._requests.clear()
        failed = True
        try:
            engine.close()
            failed = engine.control.lost or engine.broken
        finally:
            del engine
            self._leave_ranks(tp, failed)
            if tp.device.type == "cuda" and tp.progress.failure is None:
                torch.cuda.empty_cache()  # waits for kernels, which may wait for a peer that is gone
            if self._record_file is not None:
                close_record_file(self._record_file)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except PeerLost:
            if error is None:  # else the error under way says more
                raise
