"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector) => document.querySelector(selector);
  const cards = all(".card");
  const find = one("#find");
  const buttons = all("button[data-filter]");
  const filters = buttons.length > 0; // a page of a server is filtered there
  const texts = new Map();
  let here = -1;

  const textOf = (card, row) => {
    if (!texts.has(row)) {
      const parts = [...all(".name", card), ...all("h2, .text, .none", row)];
      texts.set(row, parts.map((part) => part.textContent).join("\n").toLowerCase());
    }
    return texts.get(row);
  };

  const state = () => new URLSearchParams(location.hash.slice(1));

  const apply = () => {
    const show = state().get("show") || "";
    const words = (state().get("find") || "").toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    let total = 0;
    for (const card of cards) {
      let left = 0;
      for (const row of all(".row", card)) {
        const flags = row.dataset.flags.split(" ");
        const fits = (!show || flags.includes(show)) && words.every((word) => textOf(card, row).includes(word));
        row.hidden = !fits;
        left += fits;
        total += 1;
      }
      card.hidden = left === 0;
      shown += left;
    }
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.filter === show));
    }
    if (find !== document.activeElement) {
      find.value = state().get("find") || "";
    }
    one("#count").textContent = shown === total ? `${total} shown` : `${shown} of ${total} shown`;
    one("#nothing").hidden = shown > 0;
  };

  const choose = (name, value) => {
    const next = state();
    if (value) {
      next.set(name, value);
    } else {
      next.delete(name);
    }
    history.replaceState(null, "", "#" + next);
    apply();
  };

  const go = (step) => {
    const open = cards.filter((card) => !card.hidden);
    if (open.length === 0) {
      return;
    }
    const at = here < 0 ? -1 : open.findIndex((card) => cards.indexOf(card) >= here);
    const onIt = at >= 0 && cards.indexOf(open[at]) === here;
    const next = here < 0 ? 0 : step > 0 ? at + (onIt ? 1 : 0) : at - 1;
    const target = open[Math.min(Math.max(at < 0 && here >= 0 ? open.length - 1 : next, 0), open.length - 1)];
    for (const card of cards) {
      card.classList.toggle("here", card === target);
    }
    here = cards.indexOf(target);
    target.focus({ preventScroll: true });
    target.scrollIntoView({ block: "start" });
  };

  // what a word owes to which part of the picture, painted over it
  let painted = null;
  const clear = () => {
    if (painted) {
      painted.canvas.remove();
      painted.word.classList.remove("on");
      painted = null;
    }
  };
  const paint = (word) => {
    clear();
    const frame = word.closest(".card").querySelector(".frame");
    if (!frame) {
      return;
    }
    const [columns, rows] = word.closest(".text").dataset.grid.split("x").map(Number);
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d");
    const cells = context.createImageData(columns, rows);
    [...word.dataset.heat].forEach((digit, place) => {
      const heat = parseInt(digit, 16) / 15;
      cells.data.set([255, Math.round(190 * (1 - heat)), 40, Math.round(200 * heat)], 4 * place);
    });
    context.putImageData(cells, 0, 0);
    frame.append(canvas);
    word.classList.add("on");
    painted = { canvas, word };
  };
  const step = (by) => {
    const card = cards[here] && !cards[here].hidden ? cards[here] : cards.find((one) => !one.hidden);
    const words = card ? all(".row:not([hidden]) .heated", card) : [];
    if (words.length) {
      const at = painted ? words.indexOf(painted.word) : -1;
      const next = words[at < 0 ? (by > 0 ? 0 : words.length - 1) : (at + by + words.length) % words.length];
      paint(next);
      next.scrollIntoView({ block: "nearest" });
    }
  };
  if (one(".heated[data-heat]")) {
    addEventListener("pointerover", (event) => {
      const word = event.target.closest(".heated[data-heat]");
      if (word) {
        paint(word);
      } else if (event.pointerType === "mouse") {
        clear();
      }
    });
    addEventListener("pointerdown", (event) => event.target.closest(".heated[data-heat]") || clear());
  }

  const remember = (theme) => {
    try {
      localStorage.setItem("vlmfix-theme", theme);
    } catch {
      // a page from the disk may have nowhere to keep it
    }
  };
  const remembered = () => {
    try {
      return localStorage.getItem("vlmfix-theme");
    } catch {
      return null;
    }
  };
  const root = document.documentElement;
  if (["light", "dark"].includes(remembered())) {
    root.dataset.theme = remembered();
  }
  one("#theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remember(root.dataset.theme);
  });

  one("#keys").addEventListener("click", () => one("#help").showModal());
  if (filters) {
    for (const button of buttons) {
      button.addEventListener("click", () => choose("show", button.dataset.filter));
    }
    find.addEventListener("input", () => choose("find", find.value.trim()));
    find.form.addEventListener("submit", (event) => event.preventDefault());
    addEventListener("hashchange", apply);
    apply();
  }
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || one("#help").open) {
      return;
    }
    if (event.target === find) {
      if (event.key === "Escape") {
        event.preventDefault(); // some browsers would empty the field and tell nobody
        find.blur();
      }
      return;
    }
    const actions = {
      j: () => go(1),
      k: () => go(-1),
      w: () => step(1),
      b: () => step(-1),
      Escape: clear,
      "/": () => find.focus(),
      "?": () => one("#help").showModal(),
    };
    if (Object.hasOwn(actions, event.key)) {
      event.preventDefault();
      actions[event.key]();
    }
  });
})();
