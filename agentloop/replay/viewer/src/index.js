// What `dist/viewer.js` exports; docs/viewer.md, «Protocol».

import { mount } from "./app.js";
import { embeddedHost, httpHost, widgetHost } from "./hosts.js";
import { PROTOCOL } from "./overview.js";

/** anywidget's entry point. */
function render({ model, el }) {
  const viewer = mount(el, widgetHost(model));
  return () => viewer.destroy();
}

export { embeddedHost, httpHost, mount, PROTOCOL, render };
export default { render };
