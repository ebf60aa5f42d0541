// The server's API, same origin: what it streams as events, and what went wrong as sentences.

const KEY = "api-key";
const LOST = "The server cannot be reached. Is it running, and are you online?";
const CUT = "The connection was lost before the answer was whole.";
const BUSY = "The server is busy with other answers.";

/** What a person can read; status 0: the network. retryAfter: seconds, or null. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** Kept for this tab alone. */
export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** The models that the server answers with. */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/**
 * The events of one answer, as the server sends them; returns when it is complete or incomplete.
 * Throws an ApiError for everything else, and an AbortError when `signal` stops it.
 */
export async function* respond(body, signal) {
  const response = await request("v1/responses", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of serverSentEvents(response.body, signal)) {
    if (data === "[DONE]") break;
    const event = JSON.parse(data);
    const failure = failureOf(event);
    if (failure) throw new ApiError(failure.message || CUT, { status: 500, code: failure.code });
    yield event;
    if (event.type === "response.completed" || event.type === "response.incomplete") return;
  }
  throw new ApiError(CUT);
}

function failureOf(event) {
  if (event.type === "error") return event.error || event;
  return event.type === "response.failed" ? event.response.error || {} : null;
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(LOST);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const { status } = response;
  const error = (await response.json().catch(() => null))?.error;
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
  const words = status === 429 ? BUSY : error?.message;
  const message = words || `The server answered with status ${status}.`;
  const retryAfter = Number.isNaN(seconds) ? null : Math.max(1, seconds);
  return new ApiError(message, { status, code: error?.code, retryAfter });
}

/** The `data` of each event in a stream of bytes. */
async function* serverSentEvents(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    if (signal.aborted) throw new DOMException("stopped", "AbortError");
    throw error instanceof ApiError ? error : new ApiError(CUT);
  } finally {
    reader.cancel().catch(() => {});
  }
}
