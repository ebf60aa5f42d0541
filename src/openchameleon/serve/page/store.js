// The conversation in the browser's own database, so that a reload brings it back, pictures too.

const STORE = "conversations";
const MAX_CHARS = 40e6;

/** The saved value, or null; a browser that keeps nothing is no error. */
export const load = () => transact("readonly", (store) => store.get("current")).catch(() => null);

/** Saves a conversation and its draft; turns too old to fit are left out. */
export function save(conversation, draft) {
  const { turns, start } = conversation;
  let room = MAX_CHARS;
  let first = turns.length;
  while (first > 0 && (room -= size(turns[first - 1])) >= 0) first--;
  const kept = { turns: turns.slice(first), start: Math.max(0, start - first) };
  // A copy through JSON: turns go on changing while the database writes.
  const value = JSON.parse(JSON.stringify({ conversation: kept, draft }));
  return transact("readwrite", (store) => store.put(value, "current")).catch(() => {});
}

const size = (turn) =>
  turn.parts.reduce((sum, part) => sum + (part.text ?? part.src ?? "").length, 0);

async function transact(mode, use) {
  const database = await open();
  try {
    return await settled(use(database.transaction(STORE, mode).objectStore(STORE)));
  } finally {
    database.close();
  }
}

function open() {
  const request = indexedDB.open("openchameleon", 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE);
  return settled(request);
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
