(() => {
  "use strict";
  const minus = (text) => text.replace("-", "\u2212");
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  // ---- the weights of any round, painted into the images that show the last one

  function weights(panel, data) {
    const kept = data.weights, figure = panel.querySelector(".weights");
    if (!kept || !figure) return;
    const bytes = Uint8Array.from(atob(kept.bytes), (c) => c.charCodeAt(0));
    const [, blocks, rows, models] = kept.shape;
    const images = [...figure.querySelectorAll("image")].slice(0, blocks);
    const points = [...panel.querySelectorAll(".point")];
    const canvas = document.createElement("canvas");
    canvas.width = models;
    canvas.height = rows;
    const pen = canvas.getContext("2d");
    const start = (round, block) => ((round * blocks) + block) * rows * models;
    let now = kept.rounds.length - 1;

    function show(round) {
      now = round;
      images.forEach((image, block) => {
        const picture = pen.createImageData(models, rows);
        for (let i = 0, at = start(round, block); i < rows * models; i++) {
          picture.data.set([209, 65, 9, bytes[at + i]], 4 * i);
        }
        pen.putImageData(picture, 0, 0);
        image.setAttribute("href", canvas.toDataURL());
      });
      const places = data.path[round];
      points.forEach((point, i) => {
        point.setAttribute("transform", `translate(${places[2 * i]} ${places[2 * i + 1]})`);
      });
    }

    const slider = panel.querySelector(".slider input");
    if (slider) {
      const output = panel.querySelector(".slider output");
      const button = panel.querySelector(".play");
      let timer = 0;
      const stop = () => {
        clearInterval(timer);
        timer = 0;
        button.textContent = "Play";
      };
      const tell = () => {
        output.value = kept.rounds[slider.value];
        slider.setAttribute("aria-valuetext", `round ${output.value}`);
      };
      const move = () => {
        tell();
        show(Number(slider.value));
      };
      tell();
      slider.addEventListener("input", () => { stop(); move(); });
      button.addEventListener("click", () => {
        if (timer) return stop();
        if (slider.value === slider.max) slider.value = 0;
        button.textContent = "Stop";
        move();
        timer = setInterval(() => {
          slider.value = Number(slider.value) + 1;
          move();
          if (slider.value === slider.max) stop();
        }, 350);
      });
    }

    const who = (row) => {
      const client = data.clients.find((one) => one.index === kept.clients[row]);
      if (!client) return `client number ${kept.clients[row] + 1}`;
      return client.id + (client.kind === null ? "" : `, ${client.kind}`);
    };
    cells(figure, images, rows, models, (block, row, model) => {
      const weight = bytes[start(now, block) + row * models + model] / 255 * kept.scale;
      return `${who(row)}: weight ${weight.toFixed(2)} of model ${model + 1}, ` +
        `block ${data.blocks[block] ?? block}, round ${kept.rounds[now]}`;
    });
    const worth = panel.querySelector(".worth");
    if (worth) {
      cells(worth, [...worth.querySelectorAll("image")].slice(0, 1), rows, models, (_, row, model) => {
        const client = data.clients.find((one) => one.index === kept.clients[row]);
        const value = client?.worth[model] ?? null;
        const text = value === null ? "unknown" : minus((value / 1000).toFixed(3));
        return `${who(row)}: model ${model + 1} is worth ${text}`;
      });
    }
  }

  // The cells of a picture are read out under the pointer, or under a frame that arrow keys move.
  function cells(figure, images, rows, columns, say) {
    const svg = figure.querySelector("svg"), readout = figure.querySelector(".readout");
    const resting = readout.textContent;
    const frame = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    let at = [0, 0, 0];
    figure.classList.add("lively");
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("role", "application");
    for (const [name, value] of [["class", "cell"], ["width", 1], ["height", 1]]) {
      frame.setAttribute(name, value);
    }
    function go(block, row, column) {
      at = [block, row, column];
      frame.setAttribute("transform", images[block].getAttribute("transform"));
      frame.setAttribute("x", column);
      frame.setAttribute("y", row);
      images[block].after(frame);
      readout.textContent = say(block, row, column);
    }
    function rest() {
      frame.remove();
      readout.textContent = resting;
    }
    const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [block, row, column] = at;
      if (!frame.isConnected) return go(block, row, column);
      // All blocks are one row of cells, left to right.
      const place = within(block * columns + column + step[1], images.length * columns);
      go(Math.floor(place / columns), within(row + step[0], rows), place % columns);
    });
    svg.addEventListener("blur", rest);
    images.forEach((image, block) => {
      image.addEventListener("pointermove", (event) => {
        const box = image.getBoundingClientRect();
        const row = Math.floor((event.clientY - box.top) / box.height * rows);
        const column = Math.floor((event.clientX - box.left) / box.width * columns);
        if (row >= 0 && row < rows && column >= 0 && column < columns) go(block, row, column);
      });
      image.addEventListener("pointerleave", rest);
    });
  }

  // ---- one client

  // The nearest of `points` in direction `way`, where what lies aside counts as farther; or none.
  function neighbour(points, from, way) {
    const place = (point) => point.getAttribute("transform").match(/-?[\d.]+/g).map(Number);
    const [x, y] = place(from);
    let next = null, least = Infinity;
    for (const point of points) {
      const [dx, dy] = [place(point)[0] - x, place(point)[1] - y];
      const along = dx * way[0] + dy * way[1], aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
      if (along > 0 && along + 2 * aside < least) [next, least] = [point, along + 2 * aside];
    }
    return next;
  }

  // Bars between `low` and `high`, which are written beside the title: all of a kind share them.
  function bars(title, values, names, style, words, low, high) {
    const part = make("div"), chart = make("div", undefined, `bars ${style}`);
    const axis = make("div", undefined, "axis"), head = make("h5", title);
    const share = (value) => `${value / (high - low) * 100}%`;
    head.append(make("small", `${words(low)} to ${words(high)}`));
    chart.style.setProperty("--zero", share(-low));
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", values.map((v, i) => `${names[i]}: ${words(v)}`).join(", "));
    values.forEach((value, i) => {
      const column = make("span"), bar = make("i", undefined, value < 0 ? "below" : "");
      bar.style.height = share(Math.abs(value));
      bar.style.bottom = share(Math.min(value, 0) - low);
      column.title = `${names[i]}: ${words(value)}`;
      column.append(bar);
      chart.append(column);
      axis.append(make("span", values.length <= 30 ? names[i] : ""));
    });
    part.append(head, chart, axis);
    return part;
  }

  function scores(client, data) {
    const part = make("div", undefined, "wide"), list = make("ul", undefined, "scores");
    const known = client.values.map((value, i) => ({ value, method: data.methods[i] }))
      .filter((one) => one.value !== null);
    const sign = data.metric === "accuracy" ? -1 : 1;
    const size = (value) => value === "diverged" ? Infinity : value;  // of a loss
    known.sort((a, b) => size(a.value) === size(b.value) ? 0 : sign * (size(a.value) - size(b.value)));
    const finite = known.map((one) => one.value).filter((value) => value !== "diverged");
    const most = data.metric === "accuracy" ? 1000 : Math.max(...finite, 1);
    for (const { value, method } of known) {
      const item = make("li", undefined, method.name === data.ours ? "ours" : "");
      const bar = make("i"), name = make("b", method.name);
      const gone = value === "diverged";
      bar.style.width = `${gone ? 0 : value / most * 100}%`;
      item.append(name, bar, make("span", gone ? value : (value / 1000).toFixed(3)));
      list.append(item);
    }
    part.append(make("h5", `test ${data.metric} under each method, merged model`), list);
    return part;
  }

  function clients(panel, data) {
    const picker = panel.querySelector(".picker select"), card = panel.querySelector(".card");
    if (!picker) return;
    const points = [...panel.querySelectorAll(".point")];
    const count = (n) => `${n}`, share = (w) => (w / 100).toFixed(2);
    function show() {
      const client = data.clients[picker.value];
      const size = make("div");
      size.append(make("h5", "examples"),
        make("p", `${client.n[0]} to train, ${client.n[1]} to validate, ${client.n[2]} to test`));
      if (client.kind !== null) size.append(make("p", `true kind: ${client.kind}`));
      card.replaceChildren(size);
      const numbers = (values) => values.map((_, i) => `${i + 1}`);
      if (client.labels.length) {
        card.append(bars("examples of each label", client.labels,
          client.labels.map((_, i) => `${i}`), "", count, 0, Math.max(...client.labels, 1)));
      }
      (client.row ?? []).slice(0, 8).forEach((row, block) => {
        card.append(bars(`weights, block ${data.blocks[block] ?? block}`, row, numbers(row), "ours",
          share, 0, Math.round(data.weights.scale * 100)));
      });
      if (client.worth.length) {
        const worth = client.worth.map((w) => (w ?? 0) / 1000);
        card.append(bars(`worth of each model, ${data.unit}`, worth, numbers(worth), "worth",
          (w) => minus(w.toFixed(3)), Math.min(...worth, 0), Math.max(...worth, 0.001)));
      }
      card.append(scores(client, data));
      for (const point of points) {
        const on = Number(point.dataset.client) === client.index;
        point.classList.toggle("on", on);
        point.setAttribute("aria-pressed", on);
        point.setAttribute("tabindex", on ? 0 : -1);
      }
    }
    function pick(point) {
      picker.value = data.clients.findIndex((one) => one.index === Number(point.dataset.client));
      show();
    }
    picker.addEventListener("change", show);
    for (const button of panel.querySelectorAll(".step")) {
      button.addEventListener("click", () => {
        const n = data.clients.length;
        picker.value = (Number(picker.value) + Number(button.dataset.step) + n) % n;
        show();
      });
    }
    if (points.length) points[0].ownerSVGElement.setAttribute("role", "group");
    for (const point of points) {
      point.setAttribute("role", "button");
      point.addEventListener("click", () => pick(point));
      point.addEventListener("keydown", (event) => {
        const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
        if (!way) return;
        event.preventDefault();
        const next = neighbour(points, point, way);
        if (!next) return;
        pick(next);
        next.focus();
      });
    }
    show();
  }

  // ---- a method's line, found by its name

  function lines(panel, data) {
    const buttons = [...panel.querySelectorAll(".name")];
    const figures = [...panel.querySelectorAll(".lines")];
    for (const line of panel.querySelectorAll("g[data-method]")) {
      const method = data.methods.find((one) => `${one.index}` === line.dataset.method);
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = method ? method.name : "";
      line.prepend(title);
    }
    const hues = figures.length ? figures[0].dataset.hues.split(" ") : [];
    const grey = (button) => button.querySelector(".swatch").style.background.includes("--grey");

    // A grey line is given a colour that no other pressed one has, while there are any, and its name
    // at its end.
    function light() {
      const pressed = buttons.filter((one) => one.getAttribute("aria-pressed") === "true");
      const colours = new Map();
      for (const button of pressed.filter((one) => !grey(one))) {
        colours.set(button, button.querySelector(".swatch").style.background);
      }
      pressed.filter(grey).forEach((button, i) => {
        const free = hues.filter((hue) => ![...colours.values()].includes(hue));
        colours.set(button, free[0] ?? hues[i % hues.length]);
      });
      for (const figure of figures) {
        figure.classList.toggle("lit", pressed.length > 0);
        for (const old of figure.querySelectorAll(".on, .called")) {
          old.classList.remove("on");
          if (old.matches(".called")) old.remove();
        }
        const calls = [];
        for (const button of pressed) {
          const at = button.dataset.method;
          for (const kind of ["method", "band", "label"]) {
            for (const part of figure.querySelectorAll(`[data-${kind}="${at}"]`)) {
              part.classList.add("on");
              part.style.setProperty("--on", colours.get(button));
            }
          }
          const line = figure.querySelector(`[data-method="${at}"] path`);
          if (line && !figure.querySelector(`[data-label="${at}"]`)) {
            calls.push([line, button.textContent, colours.get(button)]);
          }
        }
        call(calls);
      }
    }
    // Names one below the other, each as near to the end of its line as the others let it.
    function call(calls) {
      const ends = calls.map(([line]) => line.getPointAtLength(line.getTotalLength()));
      const order = calls.map((_, i) => i).sort((a, b) => ends[a].y - ends[b].y);
      const places = [];
      for (const i of order) places.push(Math.max(ends[i].y - 5, (places.at(-1) ?? -Infinity) + 10));
      const low = calls.length ? calls[0][0].ownerSVGElement.viewBox.baseVal.height - 4 : 0;
      for (let at = places.length - 1; at >= 0; at--) {
        places[at] = Math.min(places[at], at + 1 < places.length ? places[at + 1] - 10 : low);
      }
      order.forEach((i, at) => {
        const [line, name, colour] = calls[i];
        const text = document.createElementNS("http://www.w3.org/2000/svg", "text");
        text.textContent = name;
        text.setAttribute("class", "called");
        text.setAttribute("x", ends[i].x);
        text.setAttribute("y", places[at]);
        text.setAttribute("text-anchor", "end");
        text.style.fill = colour;
        line.ownerSVGElement.append(text);
      });
    }
    for (const button of buttons) {
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
        light();
      });
    }
  }

  // ---- a panel is made lively when it is first seen

  function enliven(panel) {
    if (panel.dataset.lively) return;
    panel.dataset.lively = "yes";
    const data = JSON.parse(panel.querySelector('script[type="application/json"]').textContent);
    for (const element of panel.querySelectorAll(".scripted")) element.hidden = false;
    lines(panel, data);
    weights(panel, data);
    clients(panel, data);
  }
  const tabs = [...document.querySelectorAll('input[name="setting"]')];
  const turn = document.getElementById("turn");
  function seen() {
    const tab = tabs.find((one) => one.checked);
    if (turn && tab) turn.value = tab.id.replace("tab-", "");
    const panel = document.getElementById(tab ? tab.id.replace("tab", "setting") : "setting-1");
    if (panel) enliven(panel);
  }
  // A setting is chosen by tab, list, button or address, and then stands in the address.
  function choose(number) {
    document.getElementById(`tab-${number}`).checked = true;
    history.replaceState(null, "", `#setting-${number}`);
    seen();
  }
  function follow() {
    const tab = document.getElementById(location.hash.replace("#setting-", "tab-"));
    if (tab && tabs.includes(tab)) tab.checked = true;
    seen();
  }
  for (const tab of tabs) tab.addEventListener("change", () => choose(tab.id.replace("tab-", "")));
  if (turn) {
    document.querySelector(".sticky").hidden = false;
    turn.addEventListener("change", () => choose(turn.value));
    for (const button of document.querySelectorAll(".turn")) {
      button.addEventListener("click", () => {
        const n = tabs.length;
        choose((Number(turn.value) - 1 + Number(button.dataset.step) + n) % n + 1);
      });
    }
  }
  // On paper nothing can be opened: all is, for as long as printing takes.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
    for (const panel of document.querySelectorAll(".panel")) enliven(panel);
  });
  addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
  });
  addEventListener("hashchange", follow);
  follow();
})();
