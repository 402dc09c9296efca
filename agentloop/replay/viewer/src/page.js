// What `dist/page.js` does: starts the viewer of the page that it stands in.

import { mount } from "./app.js";
import { embeddedHost, httpHost, parseLink } from "./hosts.js";

const root = document.getElementById("agentloop-replay");
if (root) {
  const { host, url, theme, height, link } = root.dataset;
  const options = {
    theme: theme ?? "auto",
    height: Number(height) || null,
    link: parseLink(location.hash) ?? parseLink(link),
  };
  if (!options.height) document.body.style.margin = "0";
  root.viewer = mount(root, host === "http" ? httpHost(url, options) : embeddedHost(options));
}
