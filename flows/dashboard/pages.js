// Two corrections to the server's pages (Prefect 3.8.8); flows/dashboard/pages.py puts this script into them.

// The list of a select closes at once after a click on its button, because the button and its container both handle the
// click; only the arrow beside the button opens it. Here the button passes clicks on to the container.
addEventListener("click", (event) => {
  const button = event.target.closest?.("button");
  if (button?.matches(".p-select-button__control")) {
    event.stopPropagation();
    button.parentElement.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  }
}, true);

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
