// Answers as bytes: header length (u32), four zero bytes, header as UTF-8 JSON, zeros up to a multiple of 8, buffer.

export class ViewerError extends Error {}

/** @param {ArrayBuffer} bytes */
export function decodeFrame(bytes) {
  if (bytes.byteLength < 8) throw new ViewerError("The answer is too short to be a frame.");
  const length = new DataView(bytes).getUint32(0, true);
  if (8 + length > bytes.byteLength) throw new ViewerError("The answer is cut off.");
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, length)));
  const start = (8 + length + 7) & ~7;
  return { header, buffers: start < bytes.byteLength ? [new Uint8Array(bytes, start)] : [] };
}

/** What every host's answer goes through: errors become exceptions. */
export function checked(answer) {
  if (answer.header?.kind === "error") throw new ViewerError(String(answer.header.message));
  return answer;
}

/** Gives an answer's memory back at once, where the browser can; nothing of it may be in use. */
export function release(buffers) {
  for (const buffer of buffers) (buffer.buffer ?? buffer).transfer?.(0);
}

/** The bytes of an answer where typed columns are aligned; copied only if they are not. */
export function bufferOf(buffers) {
  const buffer = buffers?.[0];
  if (!buffer) return new Uint8Array(0);
  if (buffer instanceof ArrayBuffer) return new Uint8Array(buffer);
  const bytes = new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength);
  return bytes.byteOffset % 8 === 0 ? bytes : bytes.slice();
}
