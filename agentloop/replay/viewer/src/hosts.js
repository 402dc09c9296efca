// Where answers come from: a kernel (anywidget), a server, or the page itself.

import { checked, decodeFrame, ViewerError } from "./frame.js";

/** The kernel behind an anywidget model. Several views of one model each have their own. */
export function widgetHost(model) {
  const waiting = new Map();
  const listeners = new Set();
  // Not from 0: another view of the same model, in another browser perhaps, hears the answers to our requests too.
  let next = crypto.getRandomValues(new Uint32Array(1))[0] * 1000;
  const onMessage = (message, buffers) => {
    if (message?.type === "event") for (const listener of listeners) listener(message.event ?? {});
    if (message?.type !== "answer" || !waiting.has(message.n)) return;
    const { resolve, reject } = waiting.get(message.n);
    waiting.delete(message.n);
    try {
      resolve(checked({ header: message.header, buffers: buffers ?? [] }));
    } catch (error) {
      reject(error);
    }
  };
  const onOptions = () => {
    for (const listener of listeners) listener({ kind: "options", options: model.get("options") ?? {} });
  };
  model.on("msg:custom", onMessage);
  model.on("change:options", onOptions);
  return {
    options: model.get("options") ?? {},
    request(request) {
      next += 1;
      const n = next;
      return new Promise((resolve, reject) => {
        waiting.set(n, { resolve, reject });
        model.send({ type: "request", n, request });
      });
    },
    onEvent(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    close() {
      model.off("msg:custom", onMessage);
      model.off("change:options", onOptions);
      waiting.clear();
    },
  };
}

/** A server that answers POSTed requests with frames. */
export function httpHost(url, options = {}) {
  return {
    options,
    async request(request) {
      let response;
      try {
        response = await fetch(url, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify(request),
        });
      } catch {
        throw new ViewerError("The server does not answer: was `agentloop view` ended?");
      }
      const bytes = await response.arrayBuffer();
      try {
        return checked(decodeFrame(bytes));
      } catch (error) {
        if (error instanceof ViewerError && response.ok) throw error;
        throw response.ok ? new ViewerError("The server's answer is not a frame.") : error;
      }
    },
    ...pageLinks(),
  };
}

/** Frames that stand in the page, gzipped and in base64. */
export function embeddedHost(options = {}) {
  const find = (name) => document.querySelector(`script[data-agentloop=${CSS.escape(name)}]`);
  return {
    options,
    async request(request) {
      const name = request.kind === "sample" ? `sample:${request.key}` : request.kind;
      let element = find(name);
      while (!element && document.readyState === "loading") {
        await new Promise((resolve) => setTimeout(resolve, 20));
        element = find(name);
      }
      // Of an element that is still being parsed only a part is there.
      while (element && !element.nextSibling && document.readyState === "loading") {
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      if (!element) throw new ViewerError(`This page does not hold ${request.key ? `trajectory ${request.key}` : name}.`);
      return checked(decodeFrame(await inflate(element.textContent)));
    },
    ...pageLinks(),
  };
}

async function inflate(text) {
  const binary = atob(text.trim());
  const packed = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) packed[i] = binary.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return await new Response(stream).arrayBuffer();
}

// -- links ----------------------------------------------------------------------------------------------------------

/** `LINK` as `key=…&token=…`. */
export function formatLink(link) {
  const parts = ["view", "key", "turn", "token"].filter((name) => link[name] !== undefined && link[name] !== null);
  return parts.map((name) => `${name}=${encodeURIComponent(link[name])}`).join("&");
}

export function parseLink(text) {
  const values = new URLSearchParams(String(text ?? "").replace(/^#/, ""));
  const link = {};
  for (const name of ["view", "key"]) if (values.get(name)) link[name] = values.get(name);
  for (const name of ["turn", "token"]) {
    if (/^-?\d+$/.test(values.get(name) ?? "")) link[name] = Number(values.get(name));
  }
  return Object.keys(link).length ? link : null;
}

function pageLinks() {
  let own = location.hash;
  return {
    // A page of its own has the keyboard from the start; a frame in somebody's notebook has it when it is clicked.
    takesFocus: window === window.top,
    setLink(link, newPlace) {
      own = `#${formatLink(link)}`;
      try {
        history[newPlace ? "pushState" : "replaceState"](null, "", own);
      } catch {
        // A frame without an address of its own.
      }
    },
    linkText(link) {
      return location.href.startsWith("about:") ? formatLink(link) : `${location.href.replace(/#.*/s, "")}#${formatLink(link)}`;
    },
    onEvent(listener) {
      const onMove = () => {
        if (location.hash === own) return;
        own = location.hash;
        listener({ kind: "goto", link: parseLink(own) ?? { view: "run" } });
      };
      addEventListener("popstate", onMove);
      addEventListener("hashchange", onMove);
      return () => {
        removeEventListener("popstate", onMove);
        removeEventListener("hashchange", onMove);
      };
    },
  };
}
