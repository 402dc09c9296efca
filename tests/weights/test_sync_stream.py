"""An export on its way: one bucket ahead of the reader, and no more."""

from __future__ import annotations

import asyncio

import pytest

from agentloop.errors import EngineError
from agentloop.weights.sync_stream import Stream
from tests.engines.support import until
from tests.weights.sync_support import SMALL_BUCKET, Trainer


async def test_the_next_bucket_is_made_while_one_is_sent_and_no_further_one() -> None:
    stream = Stream(Trainer().source, bucket_bytes=SMALL_BUCKET)
    read = 0
    async for _ in stream:
        read += 1
        await until(lambda: stream._ahead is None or stream._ahead.done())
        await asyncio.sleep(0.005)
        assert stream.buckets == read + 1 or read == stream.buckets > 20
    await stream.finish()
    assert read == stream.buckets > 20
    assert stream.nbytes == sum(tensor.nbytes for tensor in Trainer().tensors().values())
    assert stream.sent == Trainer().checksums()


async def test_nothing_is_handed_on_after_stop() -> None:
    trainer = Trainer()
    stream = Stream(trainer.source, bucket_bytes=SMALL_BUCKET)
    assert await stream.next() is not None
    stream.stop()
    with pytest.raises(EngineError, match="given up"):
        await stream.next()
    await stream.finish()
    await stream.finish()
