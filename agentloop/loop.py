"""The state machine of one trajectory.

`AgentLoop.run` takes a sample from prompt to reward: generate, call the tools that the model asked for, append what they
answered, generate again. The table `TRANSITIONS` says which state may follow which. Whatever the engine, a tool or the
reward does, `run` returns a trajectory with an end reason; it raises only for wrong input (`ConfigError`), for a broken
invariant (`LedgerError`), for bugs, and when it is cancelled.

Work per turn is O(new tokens): the history is neither rendered nor tokenised again, and the ledger's own token list goes to
the engine without a copy.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

from agentloop.chat.base import Message, Parsed, Renderer, ToolCallParser
from agentloop.config import LoopConfig
from agentloop.engines.base import Engine, Sampling
from agentloop.errors import ConfigError, EngineError, ToolInfraError
from agentloop.fit import fit
from agentloop.generate import derive_seed, generate
from agentloop.journal.base import NullRecorder, Recorder
from agentloop.rewards.base import RewardFunction
from agentloop.tools.session import CANCEL_GRACE_S, ToolSession, ToolSessions, give_up_at
from agentloop.trajectory import (
    CallRecord,
    CallStatus,
    EndReason,
    Reward,
    Sample,
    State,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)
from agentloop.waiting import to_the_end

logger = logging.getLogger(__name__)

TRANSITIONS: dict[State, tuple[State, ...]] = {
    State.PENDING: (State.GENERATING, State.SCORING, State.FAILED, State.ABORTED),
    State.GENERATING: (State.CALLING_TOOLS, State.SCORING, State.FAILED, State.ABORTED),
    State.CALLING_TOOLS: (State.GENERATING, State.SCORING, State.FAILED, State.ABORTED),
    State.SCORING: (State.DONE, State.FAILED, State.ABORTED),
    State.DONE: (),
    State.FAILED: (),
    State.ABORTED: (),
}
"""PENDING goes to SCORING when the prompt is too long to begin with; a trajectory whose end reason is masked goes to FAILED
without being scored."""

_MODELS_OWN = (CallStatus.OK, CallStatus.INVALID_ARGUMENTS, CallStatus.UNKNOWN_TOOL, CallStatus.NOT_RUN)
"""Call statuses that are the model's doing: always an observation."""


def transition(trajectory: Trajectory, state: State) -> None:
    """Enter `state`; a step that the table does not know is a bug."""
    if state not in TRANSITIONS[trajectory.state]:
        raise RuntimeError(f"trajectory {trajectory.id}: no way from {trajectory.state} to {state}")
    trajectory.state = state


def print_transitions() -> str:
    """The table as text, one state a line."""
    return "\n".join(f"{state.value:14} -> {', '.join(after) or '(end)'}" for state, after in TRANSITIONS.items())


def _is_cancelled() -> bool:
    """Whether somebody cancels the task that runs; else a `CancelledError` is a failure of whoever raises it."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class _End(Exception):
    """Ends the trajectory from wherever it is."""

    def __init__(self, reason: EndReason, error: str | None = None) -> None:
        super().__init__(error or reason.value)
        self.reason = reason
        self.error = error


class _Resample(Exception):
    """A tool failed and its policy is to start the trajectory anew."""

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


@dataclass(slots=True)
class _Run:
    """What one attempt holds while it runs."""

    trajectory: Trajectory
    renderer: Renderer
    session: ToolSession | None
    sampling: Sampling
    deadline: float
    """On the event loop's clock."""
    key: str
    """The name of this trajectory for the engine and the tools, unique within the run."""
    parse_failures: int = 0
    text: str = ""
    """Content of the last turn, or what was submitted."""


class AgentLoop:
    """Runs trajectories, any number at a time; holds no state of any of them.

    `renderer` is a renderer, or a function from chat-template arguments to one, for samples that bring their own
    (`Sample.template_kwargs`). Without `reward` trajectories end unscored (`Trajectory.reward` is `None`).
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer | Callable[[Mapping[str, Any]], Renderer],
        parser: ToolCallParser,
        *,
        tools: ToolSessions | None = None,
        reward: RewardFunction | None = None,
        config: LoopConfig | None = None,
        recorder: Recorder | None = None,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.renderer = renderer
        self.parser = parser
        self.tools = tools
        self.reward = reward
        self.config = config or LoopConfig()
        self.recorder: Recorder = recorder or NullRecorder()
        self.seed = seed
        not_taken = getattr(renderer, "not_taken", {})
        if tools is not None and "tool" in not_taken:
            raise ConfigError(f"tools are configured, and the chat template does not take their answers: {not_taken['tool']}")

    async def run(
        self,
        sample: Sample,
        *,
        sampling: Sampling | None = None,
        sibling: int = 0,
        step: int = 0,
        validate: bool = False,
    ) -> Trajectory:
        """One trajectory, from prompt to reward.

        `sampling` gives temperature, top-p, top-k and stop strings; its `max_tokens` bounds a turn beside the config's own
        budgets, and its seed is replaced by one derived from (run seed, sample, sibling, attempt, turn).
        """
        attempt = 0
        while True:
            trajectory = Trajectory(sample, sibling=sibling, step=step, validate=validate)
            trajectory.attempt = attempt
            try:
                await self._attempt(trajectory, sampling or Sampling(max_tokens=self.config.max_response_tokens))
            except _Resample:
                attempt += 1
                continue
            return trajectory

    # -- one attempt ------------------------------------------------------------------------------------------------

    async def _attempt(self, trajectory: Trajectory, sampling: Sampling) -> None:
        """Run to an end state. Raises `_Resample` if another attempt is to follow; the failed one is recorded all the same."""
        started = perf_counter()
        config, sample = self.config, trajectory.sample
        part = "val" if trajectory.validate else "train"
        run: _Run | None = None
        resample: _Resample | None = None
        try:
            renderer = self.renderer if isinstance(self.renderer, Renderer) else self.renderer(sample.template_kwargs)
            key = f"{part}-{trajectory.step}-{trajectory.id}"
            session = self.tools.session(sample, key) if self.tools is not None else None
            run = _Run(
                trajectory=trajectory,
                renderer=renderer,
                session=session,
                sampling=replace(sampling, stop_token_ids=(*renderer.stop_token_ids, *sampling.stop_token_ids)),
                deadline=asyncio.get_running_loop().time() + config.deadlines.trajectory_s,
                key=key,
            )
            trajectory.sampling = {k: v for k, v in asdict(run.sampling).items() if k != "seed"}
            try:
                await self._converse(run)
            except _End as end:
                trajectory.end_reason, trajectory.error = end.reason, end.error
            except _Resample as again:
                trajectory.end_reason, trajectory.error = EndReason.TOOL_FAILURE, again.error
                if trajectory.attempt < config.max_resamples:
                    resample = again
            trajectory.check()
            await self._finish(run, discard=resample is not None)
        except asyncio.CancelledError:
            self._abandon(trajectory, EndReason.ABORTED, State.ABORTED, "cancelled")
            raise
        except BaseException as error:
            self._abandon(trajectory, None, State.FAILED, f"{type(error).__name__}: {error}")
            raise
        finally:
            cancelled = run is not None and await self._release(run)
            trajectory.total_s = perf_counter() - started
            if len(trajectory):
                self.recorder.trajectory_end(trajectory)
            if cancelled:
                raise asyncio.CancelledError
        if resample is not None:
            raise resample

    @staticmethod
    def _abandon(trajectory: Trajectory, reason: EndReason | None, state: State, error: str) -> None:
        trajectory.end_reason = reason or trajectory.end_reason
        trajectory.masked = True
        trajectory.reward = None
        trajectory.error = trajectory.error or error
        if TRANSITIONS[trajectory.state]:
            transition(trajectory, state)

    async def _release(self, run: _Run) -> bool:
        """Give back what the trajectory held, to the end even if the trajectory is cancelled meanwhile; whether it was."""
        try:
            await to_the_end(self._give_back(run))
        except asyncio.CancelledError:
            return True
        return False

    async def _give_back(self, run: _Run) -> None:
        """Each part has its own guard; nothing here can change the outcome."""
        limit = self.config.deadlines.release_s
        parts: list[tuple[str, Callable[[], Awaitable[None]]]] = [("engine", partial(self.engine.release, run.key))]
        if run.session is not None:
            parts.insert(0, ("tools", run.session.close))
        for name, release in parts:
            try:
                async with asyncio.timeout(limit):
                    await release()
            except TimeoutError:
                logger.error("trajectory %s: releasing its %s took longer than %g s", run.key, name, limit)
            except Exception:
                logger.exception("trajectory %s: releasing its %s failed", run.key, name)

    # -- the conversation -------------------------------------------------------------------------------------------

    async def _converse(self, run: _Run) -> None:
        """From the prompt to the last turn. Always leaves by `_End` or `_Resample`."""
        trajectory, config = run.trajectory, self.config
        schemas = run.session.schemas if run.session is not None else []
        prompt = run.renderer.prompt(trajectory.sample.messages, schemas or None)
        trajectory.append_prompt(prompt)
        self.recorder.trajectory_start(trajectory)
        if len(prompt) > config.max_prompt_tokens:
            limit = config.max_prompt_tokens
            raise _End(EndReason.TOKEN_LIMIT, f"the prompt has {len(prompt)} tokens, max_prompt_tokens is {limit}")
        if run.session is not None:
            await self._open(run, run.session)
        in_reasoning = run.renderer.opens_reasoning_after(trajectory.sample.messages)
        while True:
            transition(trajectory, State.GENERATING)
            turn = await self._generate(run)
            sampled = trajectory.input_ids[turn.start : turn.end]
            parsed = self.parser.parse(sampled, turn=turn.index, in_reasoning=in_reasoning)
            run.text = parsed.content
            calls = self._what_next(run, turn, parsed)
            transition(trajectory, State.CALLING_TOOLS)
            messages = await self._call_tools(run, turn, calls, parsed.errors)
            self._end_if_submitted(run, turn)
            await self._append_observation(run, turn, sampled, messages)
            in_reasoning = run.renderer.opens_reasoning_after(messages)
            if len(trajectory.turns) >= config.max_turns:
                raise _End(EndReason.TURN_LIMIT)

    async def _open(self, run: _Run, session: ToolSession) -> None:
        try:
            async with asyncio.timeout_at(run.deadline):
                await session.open()
        except TimeoutError:
            raise _End(EndReason.DEADLINE, "the trajectory's deadline passed while its tools were created") from None
        except ToolInfraError as error:
            raise _End(EndReason.TOOL_FAILURE, str(error)) from error

    def _what_next(self, run: _Run, turn: Turn, parsed: Parsed) -> Sequence[ToolCall]:
        """The calls to run after `turn`; ends the trajectory if nothing is to follow it."""
        config, calls, errors = self.config, parsed.calls, parsed.errors
        turn.parse_errors = errors
        cut = turn.stop_reason is StopReason.LENGTH
        if not calls and cut:  # a call that was cut off with its turn is the budget's doing, not a malformed one
            raise _End(EndReason.TOKEN_LIMIT)
        if not calls and not errors:
            raise _End(EndReason.FINAL_ANSWER)
        if errors:
            run.parse_failures += 1
            if config.on_parse_failure == "end" or run.parse_failures >= config.max_parse_failures:
                self._not_run(run, turn, calls, "not run: the trajectory ended with a malformed call")
                raise _End(EndReason.PARSE_FAILURE, errors[0])
        if config.final_turn_without_tools and turn.index + 1 >= config.max_turns:
            final = run.session.final if run.session is not None else ()
            self._not_run(run, turn, [call for call in calls if call.name not in final], "not run: this was the final turn")
            calls = [call for call in calls if call.name in final]
            if not calls:
                raise _End(EndReason.TURN_LIMIT)
        return calls

    @staticmethod
    def _end_if_submitted(run: _Run, turn: Turn) -> None:
        """A call of a final tool that ended well is the answer; of several in one turn, the last."""
        final = run.session.final if run.session is not None else ()
        for record in reversed(turn.calls):
            if record.status is CallStatus.OK and record.call.name in final:
                run.text = record.text
                raise _End(EndReason.FINAL_ANSWER)

    # -- generating -------------------------------------------------------------------------------------------------

    async def _generate(self, run: _Run) -> Turn:
        """One generation, appended to the ledger as a turn."""
        trajectory, config = run.trajectory, self.config
        room = config.max_response_tokens - trajectory.response_len
        if room <= 0:
            raise _End(EndReason.TOKEN_LIMIT)
        index = len(trajectory.turns)
        sample = trajectory.sample
        sampling = replace(
            run.sampling,
            max_tokens=min(room, run.sampling.max_tokens, config.max_turn_tokens or room),
            seed=derive_seed(self.seed, sample.seed_key or sample.uid, trajectory.sibling, trajectory.attempt, index),
        )
        started = perf_counter()
        clock = asyncio.get_running_loop()
        limit = min(run.deadline, clock.time() + config.deadlines.generate_s)
        try:
            async with asyncio.timeout_at(limit) as timeout:
                try:
                    answer = await generate(self.engine, trajectory.input_ids, sampling, run.key)
                except asyncio.CancelledError as error:
                    if _is_cancelled():
                        raise
                    raise EngineError("the engine cancelled the request") from error
        except TimeoutError as error:
            if not timeout.expired():  # the engine's own
                raise _End(EndReason.ENGINE_FAILURE, f"the engine timed out: {error}") from error
            what = "trajectory's deadline" if limit == run.deadline else "deadline of one generation"
            raise _End(EndReason.DEADLINE, f"the {what} passed in turn {index}") from None
        except EngineError as error:
            raise _End(EndReason.ENGINE_FAILURE, str(error)) from error
        if not answer.ids:
            raise _End(EndReason.ENGINE_FAILURE, f"the engine returned no token in turn {index}")
        start = len(trajectory)
        turn = Turn(
            index=index,
            start=start,
            end=start + len(answer.ids),
            stop_reason=answer.stop_reason,
            weight_version=answer.weight_version,
            min_weight_version=answer.weight_version if answer.min_weight_version is None else answer.min_weight_version,
            version_runs=answer.version_runs,
            cached_tokens=answer.cached_tokens,
            generate_s=perf_counter() - started,
            engine_data=answer.data,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            prompt_crc=trajectory.rolling_hash,
            entropies=answer.entropies,
        )
        trajectory.append_sampled(answer.ids, answer.log_probs, turn)
        self.recorder.turn(trajectory, turn)
        return turn

    # -- tools ------------------------------------------------------------------------------------------------------

    async def _call_tools(self, run: _Run, turn: Turn, calls: Sequence[ToolCall], errors: Sequence[str]) -> list[Message]:
        """Run the calls side by side; the messages that answer them, in their order, then the malformed ones."""
        config = self.config
        started = perf_counter()
        clock = asyncio.get_running_loop()
        begun = clock.time()
        deadline = min(run.deadline, begun + config.deadlines.tools_s)
        now, late = calls[: config.max_parallel_calls], calls[config.max_parallel_calls :]
        try:
            if len(now) == 1:
                await self._call(run, turn, now[0], deadline)
            elif now:
                await self._call_many(run, turn, now, deadline)
            self._not_run(run, turn, late, f"not run: limit of {config.max_parallel_calls} calls a turn")
        finally:
            turn.calls.sort(key=lambda record: (len(record.call.id), record.call.id))  # as the model wrote them
            turn.tools_s = perf_counter() - started
        timed_out = any(record.status is CallStatus.TIMEOUT for record in turn.calls)
        if clock.time() >= (give_up_at(run.deadline, begun) if timed_out else run.deadline):
            raise _End(EndReason.DEADLINE, f"the trajectory's deadline passed in the tool calls of turn {turn.index}")
        for record in turn.calls:
            self._apply_policy(record)
        messages: list[Message] = [
            {"role": "tool", "name": record.call.name, "tool_call_id": record.call.id, "content": record.text}
            for record in turn.calls
        ]
        messages += [{"role": "tool", "content": f"Error: {error}"} for error in errors]
        return messages

    async def _call_many(self, run: _Run, turn: Turn, calls: Sequence[ToolCall], deadline: float) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for call in calls:
                    group.create_task(self._call(run, turn, call, deadline))
        except BaseExceptionGroup as bugs:  # as it is with one call
            raise bugs.exceptions[0] from bugs

    async def _call(self, run: _Run, turn: Turn, call: ToolCall, deadline: float) -> None:
        """Run one call. The session keeps the deadline and knows the tool's policy; one that does not keep it is cancelled
        here, a little later, lest a busy moment of this process makes that choice."""
        started = perf_counter()
        if run.session is None:
            record = CallRecord(call, CallStatus.UNKNOWN_TOOL, "Error: there are no tools in this conversation.")
        else:
            try:
                async with asyncio.timeout_at(deadline + CANCEL_GRACE_S):
                    record = await run.session.call(call, deadline=deadline)
            except TimeoutError:
                spent = perf_counter() - started
                record = CallRecord(call, CallStatus.TIMEOUT, f"Error: no answer within {spent:.1f} s.", run_s=spent)
            except asyncio.CancelledError:
                record = CallRecord(call, CallStatus.CANCELLED, "cancelled", run_s=perf_counter() - started)
                turn.calls.append(record)
                self.recorder.tool(run.trajectory, turn, record)
                raise
        turn.calls.append(record)
        self.recorder.tool(run.trajectory, turn, record)

    def _not_run(self, run: _Run, turn: Turn, calls: Sequence[ToolCall], text: str) -> None:
        for call in calls:
            record = CallRecord(call, CallStatus.NOT_RUN, text, attempts=0)
            turn.calls.append(record)
            self.recorder.tool(run.trajectory, turn, record)

    @staticmethod
    def _apply_policy(record: CallRecord) -> None:
        """A broken sandbox is not the model's doing, so `observe` covers what the tool itself reports, never `infra`."""
        if record.status in _MODELS_OWN:
            return
        failure = f"tool '{record.call.name}': {record.status.value}: {record.text}"
        if record.on_error == "resample":
            raise _Resample(failure)
        if record.on_error == "drop_sample" or record.status in (CallStatus.INFRA, CallStatus.CANCELLED):
            raise _End(EndReason.TOOL_FAILURE, failure)

    # -- what the model is told -------------------------------------------------------------------------------------

    async def _append_observation(self, run: _Run, turn: Turn, sampled: list[int], messages: list[Message]) -> None:
        """Append the answers and the opening of the next turn, cut to the budget; ends the trajectory if nothing fits."""
        trajectory, renderer, config = run.trajectory, run.renderer, self.config
        room = config.max_response_tokens - trajectory.response_len - config.answer_reserve_tokens
        last_is_next = config.final_turn_without_tools and len(trajectory.turns) == config.max_turns - 1
        note = f"\n{config.final_turn_note}" if last_is_next else ""
        if last_is_next and run.session is not None and run.session.final:
            note += f" A call of {' or '.join(map(repr, sorted(run.session.final)))} is still taken."
        fitted = await fit(renderer, sampled, messages, room, note)
        if fitted is None:
            raise _End(EndReason.TOKEN_LIMIT, f"the tool answers of turn {turn.index} leave no room for the model")
        for place, record in enumerate(turn.calls):
            if cut := fitted.left_out[place]:
                turn.calls[place] = replace(record, text=fitted.texts[place], cut_tokens=record.cut_tokens + cut)
        turn.closed_by_template = sampled[-1] != renderer.stop_token_ids[0]
        for origin, ids in fitted.pieces:
            trajectory.append(origin, ids)
        self.recorder.observation(trajectory, turn)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def _finish(self, run: _Run, *, discard: bool) -> None:
        """Apply the policy of the end reason: score, penalise or mask. An attempt that is started anew is masked."""
        trajectory, config = run.trajectory, self.config
        assert trajectory.end_reason is not None
        action = config.on_cutoff.of(trajectory.end_reason)
        if discard or action == "mask" or not trajectory.turns:
            trajectory.masked = True
            transition(trajectory, State.ABORTED if trajectory.end_reason is EndReason.ABORTED else State.FAILED)
            return
        transition(trajectory, State.SCORING)
        started = perf_counter()
        timeout: asyncio.Timeout | None = None
        try:
            if action == "penalty":
                trajectory.reward = Reward(config.penalty, {"penalty": config.penalty})
            else:
                late = trajectory.end_reason is EndReason.DEADLINE
                limit = asyncio.get_running_loop().time() + config.deadlines.score_s
                async with asyncio.timeout_at(limit if late else min(limit, run.deadline)) as timeout:
                    trajectory.reward = await self._score(run)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            if timeout is not None and timeout.expired():
                self._score_failed(trajectory, "scoring took longer than its deadline")
            else:
                logger.exception("trajectory %s: the reward failed", run.key)
                self._score_failed(trajectory, f"the reward failed: {type(error).__name__}: {error}")
        else:
            transition(trajectory, State.DONE)
        trajectory.score_s = perf_counter() - started

    @staticmethod
    def _score_failed(trajectory: Trajectory, error: str) -> None:
        trajectory.error, trajectory.masked, trajectory.reward = error, True, None
        transition(trajectory, State.FAILED)

    async def _score(self, run: _Run) -> Reward | None:
        from_tools = await run.session.rewards() if run.session is not None else {}
        reward: Reward | None = None
        if self.reward is not None:
            reward = await self.reward(run.trajectory, run.trajectory.sample, run.text)
            if not isinstance(reward, Reward):
                raise TypeError(f"it answered {reward!r}, which is no Reward")
            if not math.isfinite(reward.value):
                raise ValueError(f"its value is {reward.value}, which is no finite number")
        add = self.config.tool_rewards == "add" and run.session is not None
        if reward is None and not add:
            return None
        value, components, info = (reward.value, reward.components, reward.info) if reward else (0.0, {}, {})
        if add:
            value += sum(from_tools.values())
        return Reward(value, {**components, **from_tools}, info, reward.turns if reward else ())


__all__ = ["TRANSITIONS", "AgentLoop", "derive_seed", "print_transitions", "transition"]
