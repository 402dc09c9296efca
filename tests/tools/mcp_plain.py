"""An MCP server over stdio that needs no library and so starts at once, and that misbehaves when asked to.

python mcp_plain.py [listing=wide|deep|remote|loop|badname|huge|none] [start=hang|die|noise|slow-again] [pid=FILE]
[delay=SECONDS]
"""

import json
import os
import signal
import subprocess
import sys
import time

options = dict(argument.split("=") for argument in sys.argv[1:])
count = 0


def say(message):
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def tool(name, **properties):
    return {"name": name, "description": f"does {name}", "inputSchema": {"type": "object", "properties": properties}}


def listing():
    text = {"type": "string", "title": "Text", "pattern": "(a+)+$", "format": "regex"}
    tools = [tool("echo", text=text), tool("pattern", pattern=text)]
    tools += [
        tool(name)
        for name in ("count", "env", "fail", "hang", "die", "huge", "endless", "noise", "blocks", "wrong", "child", "refuse")
    ]
    tools += [tool("long", size={"type": "integer"}), tool("sleep", seconds={"type": "number"})]
    kind = options.get("listing")
    if kind == "wide":
        tools.append(tool("odd", **{f"argument_{n}": text for n in range(2000)}))
    if kind == "deep":
        nested = {}
        for _ in range(40):
            nested = {"type": "object", "properties": {"x": nested}}
        tools.append(tool("odd", x=nested))
    if kind == "remote":
        tools.append(tool("odd", x={"$ref": "http://127.0.0.1:1/schema.json"}))
    if kind == "loop":
        tools.append(tool("odd"))
        tools[-1]["inputSchema"]["$ref"] = "#"
    if kind == "badname":
        tools.append(tool("no spaces, please"))
    if kind == "none":
        tools = []
    if kind == "huge":
        tools.append(tool("odd", **{"x" * 2_000_000: text}))
    return tools


def text(value, **more):
    return {"content": [{"type": "text", "text": value}], **more}


def call(identity, name, arguments):
    global count
    if name == "echo":
        return text(arguments["text"])
    if name == "count":
        count += 1
        return text(str(count))
    if name == "env":
        return text(json.dumps(dict(os.environ)))
    if name == "fail":
        return text("no such city", isError=True)
    if name == "hang":
        time.sleep(3600)
    if name == "sleep":
        time.sleep(arguments["seconds"])
    if name == "die":
        print("a last word", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "huge":
        return text("x" * 5_000_000)
    if name == "long":
        return text("a" * arguments["size"] + "b" * arguments["size"])
    if name == "endless":
        sys.stdout.write('{"jsonrpc": "2.0", "result": "')
        while True:
            sys.stdout.write("x" * 65536)
    if name == "noise":
        print("debugging\n{}\n[1, 2\n\xff")
        return text("still here")
    if name == "child":
        child = subprocess.Popen(["sleep", "3600"], start_new_session=False)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return text(f"{os.getpid()} {child.pid}")
    if name == "blocks":
        return {
            "content": [
                {"type": "image", "data": "aaaa", "mimeType": "image/png"},
                {"type": "resource_link", "name": "notes", "uri": "http://127.0.0.1:1/notes"},
                {"type": "resource", "resource": {"uri": "file:///a", "text": "inside"}},
                {"type": "resource", "resource": {"uri": "file:///b", "blob": "aaaa", "mimeType": "audio/mp3"}},
            ]
        }
    if name == "wrong":
        return {"content": 5}
    return text("done")


print("starting", file=sys.stderr, flush=True)
if "pid" in options:
    again = os.path.exists(options["pid"] + ".first")
    open(options["pid"] + ".first", "w").close()
    with open(options["pid"] + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(options["pid"] + ".new", options["pid"])
    if again and options.get("start") == "slow-again":
        time.sleep(3600)
time.sleep(float(options.get("delay", 0)))
if options.get("start") == "hang":
    time.sleep(3600)
if options.get("start") == "die":
    sys.exit("there is no database")
if options.get("start") == "noise":
    print("Welcome!")
for line in sys.stdin:
    request = json.loads(line)
    if "id" not in request:
        continue
    method, params = request["method"], request.get("params") or {}
    if method == "initialize":
        capabilities = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}}
        say({"id": request["id"], "result": {**capabilities, "serverInfo": {"name": "plain", "version": "1"}}})
    elif method == "tools/list":
        say({"id": request["id"], "result": {"tools": listing()}})
    elif method == "tools/call" and params["name"] == "refuse":
        message = "not with " + os.environ["TOKEN"] if "TOKEN" in os.environ else "no" * 100_000
        say({"id": request["id"], "error": {"code": -32000, "message": message}})
    elif method == "tools/call":
        say({"id": request["id"], "result": call(request["id"], params["name"], params.get("arguments") or {})})
    else:
        say({"id": request["id"], "error": {"code": -32601, "message": "Method not found"}})
