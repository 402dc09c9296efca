// Writes dist/. The same sources give the same bytes; a test builds again and compares.
import { readFile } from "node:fs/promises";
import { build, transform } from "esbuild";

// The style sheet is text to the program, so it is minified apart.
const styleAsText = {
  name: "style-as-text",
  setup({ onLoad }) {
    onLoad({ filter: /\.css$/ }, async ({ path }) => {
      const { code } = await transform(await readFile(path, "utf8"), { loader: "css", minify: true, charset: "ascii" });
      return { contents: code, loader: "text" };
    });
  },
};

const common = {
  bundle: true,
  minify: true,
  charset: "ascii",
  target: ["es2022"],
  plugins: [styleAsText],
  legalComments: "none",
  logLevel: "warning",
};
const outdir = process.argv[2] ?? "dist";

await build({ ...common, entryPoints: ["src/index.js"], format: "esm", outfile: `${outdir}/viewer.js` });
await build({ ...common, entryPoints: ["src/page.js"], format: "iife", outfile: `${outdir}/page.js` });
