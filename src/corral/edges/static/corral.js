// Conveniences only: every page does its whole job without this file. No DOM sinks, so trusted types have nothing to object to.
"use strict";

const said = document.getElementById("said");

function say(button, text) {
  const before = button.textContent;
  button.textContent = text;
  if (said) said.textContent = text;
  setTimeout(() => { button.textContent = before; }, 2000);
}

// Copy fields. Without a clipboard (plain http off loopback) the text is selected instead.
for (const button of document.querySelectorAll("button[data-copy]")) {
  const source = document.getElementById(button.dataset.copy);
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      say(button, "Copied");
    } catch {
      getSelection().selectAllChildren(source);
      say(button, "Selected");
    }
  });
}

// Show a password while it is typed.
for (const button of document.querySelectorAll("button[data-reveal]")) {
  const field = document.getElementById(button.dataset.reveal);
  button.hidden = false;
  button.addEventListener("click", () => {
    const isShown = field.type === "text";
    field.type = isShown ? "password" : "text";
    button.firstChild.data = isShown ? "Show" : "Hide";
  });
}

// A button that gives something away cannot be pressed in the first second, by a click that was meant for another page.
for (const button of document.querySelectorAll("button[data-pause]")) {
  button.disabled = true;
  setTimeout(() => { button.disabled = false; }, 1000);
}

// The account menu closes with Escape and when the focus or a click goes elsewhere.
for (const menu of document.querySelectorAll("details.menu")) {
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !menu.open) return;
    menu.open = false;
    menu.querySelector("summary").focus();
  });
  menu.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !menu.contains(event.relatedTarget)) menu.open = false;
  });
  document.addEventListener("click", (event) => {
    if (!menu.contains(event.target)) menu.open = false;
  });
}
