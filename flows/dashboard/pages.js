// Mends two things in the server's pages (Prefect 3.8.8); flows/dashboard/pages.py puts it into them.

// A click on a select is handled twice, by the button and by what holds it, so that the list closes at once and only
// the arrow beside the button opens it. With this the button passes clicks on and handles none itself.
addEventListener("click", (event) => {
  const button = event.target.closest?.("button");
  if (button?.matches(".p-select-button__control")) {
    event.stopPropagation();
    button.parentElement.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  }
}, true);

// An artifact's page shows what was there when it was opened. With this it follows one that is kept up to date: the
// same id in other letters is another page to the router, which asks the server again and draws only what has changed.
const lastUpdate = {};
let spellings = 0;

// A spelling that was there before would show what was known then for a moment; so the letters count in binary.
function spellAgain(id) {
  let bits = ++spellings;
  return id.toLowerCase().replace(/[a-f]/g, (letter) => {
    const isOne = bits % 2 === 1;
    bits = Math.floor(bits / 2);
    return isOne ? letter.toUpperCase() : letter;
  });
}

setInterval(async () => {
  const id = location.pathname.match(/^\/artifacts\/artifact\/([0-9a-f-]+)$/i)?.[1];
  if (!id || document.hidden) return;
  const reply = await fetch(`/api/artifacts/${id}`).catch(() => null); // the server may be stopped for a while
  if (!reply?.ok) return;
  const artifact = await reply.json();
  if (lastUpdate[artifact.id] && lastUpdate[artifact.id] !== artifact.updated) {
    const { $router } = document.querySelector("#app").__vue_app__.config.globalProperties;
    if (location.pathname.endsWith(id)) $router.replace(location.pathname.replace(id, spellAgain(id)));
  }
  lastUpdate[artifact.id] = artifact.updated;
}, 3000);
