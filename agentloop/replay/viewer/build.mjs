// Writes dist/. The same sources give the same bytes; a test builds again and compares.
import { build } from "esbuild";

const common = {
  bundle: true,
  minify: true,
  charset: "ascii",
  target: ["es2022"],
  loader: { ".css": "text" },
  legalComments: "none",
  logLevel: "warning",
};
const outdir = process.argv[2] ?? "dist";

await build({ ...common, entryPoints: ["src/index.js"], format: "esm", outfile: `${outdir}/viewer.js` });
await build({ ...common, entryPoints: ["src/page.js"], format: "iife", outfile: `${outdir}/page.js` });
