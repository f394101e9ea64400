// Puts what has changed into the page that stands. The server draws the page (mod.rs), so all that is done here is to ask for it again:
// every two seconds, and not while nobody looks. A member that does not answer is said to be away, and its last page stays.
"use strict";
const EVERY_MS = 2000;
const live = document.getElementById("live");

function say(text, lost) {
  live.textContent = text;
  live.className = lost ? "lost" : "";
  document.getElementById("console").style.opacity = lost ? "0.5" : "";
}

async function refresh() {
  const answer = await fetch("/", { cache: "no-store", signal: AbortSignal.timeout(10000) });
  if (!answer.ok) throw new Error(`it answers ${answer.status}`);
  const next = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of next.querySelectorAll("#console > *")) {
    const now = part.id ? document.getElementById(part.id) : document.querySelector("#console > header");
    if (!now) document.getElementById("console").append(part);
    else if (now.outerHTML !== part.outerHTML && !holdsSelection(now)) now.replaceWith(part);
  }
  document.title = next.title;
  say(`· live, ${new Date().toLocaleTimeString()}`, false);
}

// What somebody is about to copy stays as it is.
function holdsSelection(part) {
  const selection = document.getSelection();
  return !selection.isCollapsed && part.contains(selection.anchorNode);
}

async function run() {
  if (!document.hidden) {
    try {
      await refresh();
    } catch (error) {
      say(`· this member does not answer since ${new Date().toLocaleTimeString()} (${error.message}); what is shown is old`, true);
    }
  }
  setTimeout(run, EVERY_MS);
}

setTimeout(run, EVERY_MS);
