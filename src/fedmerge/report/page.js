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
          picture.data.set([217, 72, 15, bytes[at + i]], 4 * i);
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
      const move = () => {
        output.value = kept.rounds[slider.value];
        slider.setAttribute("aria-valuetext", `round ${output.value}`);
        show(Number(slider.value));
      };
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

    const readout = panel.querySelector(".readout");
    const resting = readout.textContent;
    images.forEach((image, block) => {
      image.addEventListener("pointermove", (event) => {
        const box = image.getBoundingClientRect();
        const row = Math.floor((event.clientY - box.top) / box.height * rows);
        const model = Math.floor((event.clientX - box.left) / box.width * models);
        if (row < 0 || row >= rows || model < 0 || model >= models) return;
        const client = data.clients.find((one) => one.index === kept.clients[row]);
        const weight = bytes[start(now, block) + row * models + model] / 255 * kept.scale;
        const name = client ? client.id + (client.kind === null ? "" : `, ${client.kind}`) : "";
        readout.textContent = `${name}: weight ${weight.toFixed(2)} of model ${model + 1}, ` +
          `block ${data.blocks[block] ?? block}, round ${kept.rounds[now]}`;
      });
      image.addEventListener("pointerleave", () => { readout.textContent = resting; });
    });
  }

  // ---- one client

  function bars(title, values, names, style, words) {
    const part = make("div"), chart = make("div", undefined, `bars ${style}`);
    const axis = make("div", undefined, "axis");
    const most = Math.max(...values, 1e-9);
    part.append(make("h5", title));
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", values.map((v, i) => `${names[i]}: ${words(v)}`).join(", "));
    values.forEach((value, i) => {
      const bar = make("i");
      bar.style.height = `${Math.max(0, value) / most * 100}%`;
      bar.title = `${names[i]}: ${words(value)}`;
      chart.append(bar);
      axis.append(make("span", values.length <= 30 ? names[i] : ""));
    });
    part.append(chart, axis);
    return part;
  }

  function scores(client, data) {
    const part = make("div", undefined, "wide"), list = make("ul", undefined, "scores");
    const known = client.values.map((value, i) => ({ value, method: data.methods[i] }))
      .filter((one) => one.value !== null);
    const sign = data.metric === "accuracy" ? -1 : 1;
    known.sort((a, b) => sign * (a.value - b.value));
    const most = Math.max(...known.map((one) => one.value), 1);
    for (const { value, method } of known) {
      const item = make("li", undefined, method.name === data.ours ? "ours" : "");
      const bar = make("i"), name = make("b", method.name);
      name.title = method.name;
      bar.style.width = `${value / most * 100}%`;
      item.append(name, bar, make("span", (value / 1000).toFixed(3)));
      list.append(item);
    }
    part.append(make("h5", `test ${data.metric} under each method, merged model`), list);
    return part;
  }

  function clients(panel, data) {
    const picker = panel.querySelector(".picker select"), card = panel.querySelector(".card");
    if (!picker) return;
    const count = (n) => `${n}`, share = (w) => (w / 100).toFixed(2);
    function show() {
      const client = data.clients[picker.value];
      const size = make("div");
      size.append(make("h5", "examples"),
        make("p", `${client.n[0]} to train, ${client.n[1]} to validate, ${client.n[2]} to test`));
      if (client.kind !== null) size.append(make("p", `true kind: ${client.kind}`));
      card.replaceChildren(size);
      if (client.labels.length) {
        card.append(bars("examples of each label", client.labels,
          client.labels.map((_, i) => `${i}`), "", count));
      }
      (client.row ?? []).slice(0, 8).forEach((row, block) => {
        card.append(bars(`weights, block ${data.blocks[block] ?? block}`, row,
          row.map((_, i) => `${i + 1}`), "ours", share));
      });
      if (client.worth.length) {
        card.append(bars(`worth of each model, ${data.unit}`, client.worth.map((w) => (w ?? 0) / 1000),
          client.worth.map((_, i) => `${i + 1}`), "worth", (w) => minus(w.toFixed(3))));
      }
      card.append(scores(client, data));
      for (const point of panel.querySelectorAll(".point")) {
        point.classList.toggle("on", Number(point.dataset.client) === client.index);
      }
    }
    picker.addEventListener("change", show);
    for (const button of panel.querySelectorAll(".step")) {
      button.addEventListener("click", () => {
        const n = data.clients.length;
        picker.value = (Number(picker.value) + Number(button.dataset.step) + n) % n;
        show();
      });
    }
    for (const point of panel.querySelectorAll(".point")) {
      point.addEventListener("click", () => {
        picker.value = data.clients.findIndex((one) => one.index === Number(point.dataset.client));
        show();
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
    for (const button of buttons) {
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
        const on = buttons.filter((one) => one.getAttribute("aria-pressed") === "true")
          .map((one) => one.dataset.method);
        for (const figure of figures) {
          figure.classList.toggle("lit", on.length > 0);
          for (const line of figure.querySelectorAll("g[data-method]")) {
            line.classList.toggle("on", on.includes(line.dataset.method));
          }
        }
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
  function seen() {
    const tab = tabs.find((one) => one.checked);
    enliven(document.getElementById(tab ? tab.id.replace("tab", "setting") : "setting-1"));
  }
  function follow() {
    const tab = document.getElementById(location.hash.replace("#setting-", "tab-"));
    if (tab && tabs.includes(tab)) tab.checked = true;
    seen();
  }
  for (const tab of tabs) tab.addEventListener("change", seen);
  addEventListener("hashchange", follow);
  follow();
})();
