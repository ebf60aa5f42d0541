// A conversation as plain data: what the stream's events make of it, and the request it becomes.
//
//   conversation  { turns, start }      turns before `start` are no longer shown to the model
//   turn          { id, role, parts, state, note, error, seed }
//   state         "done", or of an answer: "streaming", "stopped", "failed"
//   part          { type: "text", text } or { type: "picture", src, name, progress, side }
//
// `src` is a data URL, null until something is to be seen; `progress` goes from 0 to 1 (whole);
// `side`, where it is known, is the width in pixels of what the model draws.

/** Pictures with fewer pixels a side are shown smaller than others. */
export const SMALL = 200;

const PNG = "data:image/png;base64,";

export const newConversation = () => ({ turns: [], start: 0 });

export const newTurn = (role, parts = []) => ({
  id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`,
  role,
  parts,
  state: role === "user" ? "done" : "streaming",
});

/** What of an answer can be given back to the model: its text and whole pictures. */
export const wholeParts = (turn) =>
  turn.parts.filter((p) => (p.type === "text" ? p.text.trim() : p.src && p.progress === 1));

export const textOf = (turn) =>
  turn.parts
    .filter((p) => p.type === "text" && p.text.trim())
    .map((p) => p.text.trim())
    .join("\n\n");

/** Folds one event of the stream into an answer. */
export function applyEvent(turn, event) {
  const { type, item } = event;
  if (type === "response.output_text.delta") textPart(turn, event).text += event.delta;
  else if (type === "response.output_text.done") textPart(turn, event).text = event.text;
  else if (type === "response.output_item.added" && item.type === "image_generation_call") {
    picturePart(turn, item.id).side = Number.parseInt(item.size, 10) || null;
  } else if (type === "response.image_generation_call.partial_image") {
    const part = picturePart(turn, event.item_id);
    part.src = PNG + event.partial_image_b64;
    part.progress = Math.min(0.99, event.codes_done / event.codes_total);
  } else if (type === "response.output_item.done" && item.result) {
    Object.assign(picturePart(turn, item.id), { src: PNG + item.result, progress: 1 });
  } else if (type === "response.incomplete") {
    turn.note = "The answer ends here because there is no more room for it.";
  }
}

const textPart = (turn, event) =>
  partWithKey(turn, `${event.item_id}/${event.content_index}`, { type: "text", text: "" });

const picturePart = (turn, id) =>
  partWithKey(turn, id, { type: "picture", src: null, progress: 0 });

function partWithKey(turn, key, fresh) {
  const found = turn.parts.find((part) => part.key === key);
  if (!found) turn.parts.push({ ...fresh, key });
  return found ?? turn.parts.at(-1);
}

/** Turns as `input` of a request. A question whose answer is empty is left out with it. */
export function toInput(turns) {
  return turns.flatMap((turn, i) => {
    const answer = turn.role === "user" ? turns[i + 1] : turn;
    if (answer && !wholeParts(answer).length) return [];
    return turn.role === "user" ? [userItem(turn)] : answerItems(turn);
  });
}

const userItem = (turn) => ({
  type: "message",
  role: "user",
  content: turn.parts.map((part) =>
    part.type === "text"
      ? { type: "input_text", text: part.text }
      : { type: "input_image", image_url: part.src, detail: "auto" },
  ),
});

const answerItems = (turn) =>
  wholeParts(turn).map((part) =>
    part.type === "text"
      ? {
          type: "message",
          role: "assistant",
          content: [{ type: "output_text", text: part.text, annotations: [] }],
        }
      : {
          type: "image_generation_call",
          id: part.key,
          status: "completed",
          result: part.src.slice(PNG.length),
        },
  );

/** Shows the model one exchange less, the oldest; false where only the newest is left. */
export function forgetOldest(conversation) {
  const { turns, start } = conversation;
  const next = turns.findIndex((turn, i) => i > start && turn.role === "user");
  if (next < 0) return false;
  conversation.start = next;
  return true;
}

/** Every picture, in order. */
export const picturesOf = ({ turns }) =>
  turns.flatMap((turn) => turn.parts.filter((p) => p.type === "picture" && p.src));
