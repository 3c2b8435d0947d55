// Four corrections to the server's pages (Prefect 3.8.8); flows/dashboard/pages.py puts this script into them.

// The list of a select closes at once after a click on its button, because the button and its container both handle the
// click; only the arrow beside the button opens it. Here the button passes clicks on to the container.
addEventListener("click", (event) => {
  const button = event.target.closest?.("button");
  if (button?.matches(".p-select-button__control")) {
    event.stopPropagation();
    button.parentElement.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  }
}, true);

// The form suggests a made-up name, such as xi6-eminiar, and a run would keep it. Here it suggests date and time; the flow
// puts the profile before them when the run starts (flows/publish.py).
const suggested = new WeakSet();

setInterval(() => {
  const input = document.querySelector(".flow-run-name-input input");
  if (!input?.value || suggested.has(input)) return;
  suggested.add(input);
  const now = new Date();
  const local = new Date(now - 60000 * now.getTimezoneOffset()); // toISOString writes UTC
  input.value = local.toISOString().slice(0, 16).replace("T", " ");
  input.dispatchEvent(new Event("input", { bubbles: true }));
}, 100);

// Lists of runs and a run's page show the state of a run, but not its message, which has the result or the reason of a
// failure. Here it stands below the state.
const stateMessages = new Map(); // id of a run → its message

const showMessages = () => {
  const places = new Map();
  for (const link of document.querySelectorAll('.state-list-item a[href*="/runs/flow-run/"]')) {
    places.set(link.closest(".state-list-item"), link.getAttribute("href"));
  }
  const heading = document.querySelector(".page-heading-flow-run");
  if (heading) places.set(heading, location.pathname);
  const wanted = new Set();
  for (const [place, path] of places) {
    const id = path.match(/flow-run\/([0-9a-f-]{36})/)?.[1];
    if (!id) continue;
    wanted.add(id);
    const text = stateMessages.get(id) ?? "";
    let line = place.parentElement.querySelector(":scope > .state-message");
    if (!line && text) {
      line = Object.assign(document.createElement("div"), { className: "state-message" });
      line.style.cssText = "font-size: 0.8rem; opacity: 0.8; padding: 0 1rem 0.5rem; overflow-wrap: anywhere";
      place.after(line);
    }
    if (line && line.textContent !== text) line.textContent = text;
  }
  return [...wanted];
};

setInterval(async () => {
  const ids = document.hidden ? [] : showMessages();
  if (!ids.length) return;
  const body = JSON.stringify({ flow_runs: { id: { any_: ids.slice(0, 200) } } });
  const headers = { "Content-Type": "application/json" };
  const reply = await fetch("/api/flow_runs/filter", { method: "POST", headers, body }).catch(() => null);
  if (!reply?.ok) return;
  for (const { id, state } of await reply.json()) stateMessages.set(id, state?.message ?? "");
  showMessages();
}, 2000);

// An artifact's page shows the artifact as it was when the page was opened. Here the page is loaded again when the
// artifact has changed.
const lastUpdate = {};

setInterval(async () => {
  const id = location.pathname.match(/^\/artifacts\/artifact\/([0-9a-f-]+)$/)?.[1];
  if (!id || document.hidden) return;
  const reply = await fetch(`/api/artifacts/${id}`).catch(() => null); // the server may be stopped for a while
  if (!reply?.ok) return;
  const { updated } = await reply.json();
  if (lastUpdate[id] && lastUpdate[id] !== updated) location.reload();
  lastUpdate[id] = updated;
}, 3000);
