// Mends two things in the server's pages (Prefect 3.8.8); flows/pages.py puts it into them.

// A click on a select is handled twice, by the button and by what holds it, so that the list closes at once and only
// the arrow beside the button opens it. With this the button passes clicks on and handles none itself.
addEventListener("click", (event) => {
  const button = event.target.closest?.("button");
  if (button?.matches(".p-select-button__control")) {
    event.stopPropagation();
    button.parentElement.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  }
}, true);

// An artifact's page shows what was there when it was opened. With this it follows one that is kept up to date.
const lastUpdate = {};
setInterval(async () => {
  const artifact = location.pathname.match(/^\/artifacts\/artifact\/([0-9a-f-]+)$/)?.[1];
  if (!artifact || document.hidden) return;
  const reply = await fetch(`/api/artifacts/${artifact}`).catch(() => null); // the server may be stopped for a while
  if (!reply?.ok) return;
  const { updated } = await reply.json();
  if (lastUpdate[artifact] && lastUpdate[artifact] !== updated) location.reload();
  lastUpdate[artifact] = updated;
}, 3000);
