"""What runs in the sandbox around one test of a candidate. Read as text and sent there; never called here.

It holds the inputs of one test and no expected output: nothing that could be found in this process says what is right. All
that a candidate can do to it, by patching, tracing, walking frames or writing the frame itself, is to change which value the
grader reads, and the grader compares that value outside, in a process that the candidate cannot reach.

One frame is written, `\\n<nonce> <kind> <JSON>\\n`: `value` with the returned value, `end` after a program that ended well,
or `raised`, `exited`, `threads`, `not_plain`, `too_long`, `missing` with what went wrong. In a function test it goes to a copy
of standard output that was made before the candidate's code was compiled, and whatever the candidate prints goes to standard
error; in a program test it follows the program's output.
"""

from __future__ import annotations


def _grade(text: str) -> None:
    # Everything is imported and bound before the candidate's first line, so that ordinary patching of modules changes nothing.
    import _thread
    import atexit
    import builtins
    import json
    import os
    import sys
    import threading
    import types
    from collections.abc import Callable
    from json.encoder import encode_basestring_ascii as quote
    from typing import Any

    task = json.loads(text)
    nonce, program = task["nonce"], task["fn"] is None
    write, getpid, leave, settrace, setprofile = os.write, os.getpid, os._exit, sys.settrace, sys.setprofile
    count, enumerate_threads, main_thread = _thread._count, threading.enumerate, threading.current_thread()
    run_exit_functions = atexit._run_exitfuncs
    base_error, system_exit, recursion_error = BaseException, SystemExit, RecursionError
    type_of, text_type, size = type, str, len
    scalars: dict[type, Callable[[Any], str]] = {
        bool: ("false", "true").__getitem__,
        int: int.__repr__,
        float: float.__repr__,
        str: quote,
    }
    floats = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}

    class NotPlain(Exception):
        pass

    def encode(value: Any, depth: int = 0) -> str:
        """JSON of plain values; exact types only, so that no method of the candidate's is called."""
        kind = type_of(value)
        if value is None:
            return "null"
        if kind in scalars:
            written = scalars[kind](value)
            return floats.get(written, written) if kind is float else written
        if depth > 100:
            raise NotPlain("nested more than 100 deep")
        if kind is list or kind is tuple:
            return "[" + ",".join([encode(item, depth + 1) for item in value]) + "]"
        if kind is dict:
            items = []
            for key, item in value.items():
                if key is not None and type_of(key) not in scalars:
                    raise NotPlain("a key that is no plain value")
                written = encode(key)
                items.append((written if type_of(key) is text_type else quote(written)) + ":" + encode(item, depth + 1))
            return "{" + ",".join(items) + "}"
        name = kind.__name__
        raise NotPlain(name if type_of(name) is text_type else "an object")

    def told(error: BaseException) -> str:
        try:
            message = error.__str__()
            name = type_of(error).__name__
            return (name + ": " + message)[:500] if type_of(message) is type_of(name) is text_type else "an exception"
        except base_error:
            return "an exception"

    def find(module: dict[str, Any], name: str) -> Any:
        first, *rest = name.split(".")
        if first in module:
            found = module[first]
        else:  # the convention of LeetCode: a method of a class Solution
            solution = module["Solution"]
            found = getattr(solution() if isinstance(solution, type) else solution, first)
        for part in rest:
            found = getattr(found() if isinstance(found, type) else found, part)
        return found

    sys.stdout.flush()
    channel = 1
    if not program:
        channel = os.dup(1)
        os.dup2(2, 1)
    atexit._clear()
    pid, threads = getpid(), count()
    module = types.ModuleType("__main__" if program else "solution")
    sys.modules[module.__name__] = module
    names = module.__dict__
    if not hasattr(builtins, "exit"):  # an interpreter without `site`; programs use it all the same
        names["exit"] = names["quit"] = sys.exit
    kind, body = "end", "null"
    try:
        exec(compile(task["preamble"], "<preamble>", "exec"), names)
        exec(compile(task["source"], "<solution>", "exec"), names)
        if not program:
            try:
                function = find(names, task["fn"])
            except (AttributeError, KeyError):
                kind, body = "missing", quote(task["fn"])
            else:
                returned = function(*task["args"], **task["kwargs"])
                settrace(None)
                setprofile(None)
                kind, body = "value", encode(returned)
    except NotPlain as error:
        kind, body = "not_plain", quote(error.args[0])
    except system_exit as error:
        code = error.code
        if not program or not (code is None or (type_of(code) is int and code == 0)):
            kind, body = "exited", quote(told(error))
    except recursion_error:
        kind, body = "raised", quote("RecursionError")
    except base_error as error:
        kind, body = "raised", quote(told(error))
    settrace(None)
    setprofile(None)
    if getpid() != pid:  # a forked child that came this far speaks for nobody
        leave(0)
    if program:
        try:
            for thread in enumerate_threads():
                if thread is not main_thread and not thread.daemon:
                    thread.join()
            run_exit_functions()
            sys.stdout.flush()
        except base_error as error:
            kind, body = "raised", quote(told(error))
    elif count() > threads:
        kind, body = "threads", "null"
    if size(body) > task["limit"]:
        kind, body = "too_long", "null"
    frame = ("\n" + nonce + " " + kind + " " + body + "\n").encode("ascii")
    while frame:
        frame = frame[write(channel, frame) :]
