"use strict";
(() => {
  const data = JSON.parse(document.getElementById("gallery").textContent);
  const [ID, SPLITS, WIDTH, HEIGHT, TAGS, PRESENT, LAYERS, DOUBT, AGREEMENT, STABLE, COVERAGE, PARTS, IOU, EMPTY, COVERING, DISPUTED] = Array(16).keys();
  const PAGE = 48;
  const $ = (id) => document.getElementById(id);
  const images = data.images.map((fields, number) => ({ fields, number }));
  const gap = ({ fields }) => Math.max(0, ...fields[DISPUTED].map(([, tagged, p]) => (tagged ? 1000 - p : p)));
  const known = (place) => ({ fields }) => (fields[place] === null ? Infinity : fields[place]);
  const has = (place) => images.some(({ fields }) => fields[place] !== null);

  const kinds = [
    ["all", "all", () => true],
    ["empty", "empty in spite of tags", ({ fields }) => fields[EMPTY]],
    ["covering", "covering everything", ({ fields }) => fields[COVERING]],
    ["disputed", "tags that the network disputes", ({ fields }) => fields[DISPUTED].length],
    ["negative", "without an object (negatives)", ({ fields }) => fields[TAGS] !== null && !fields[TAGS].length],
    ["unknown", "tags unknown", ({ fields }) => fields[TAGS] === null],
    ["nomask", "without a mask", ({ fields }) => fields[COVERAGE] === null],
  ].map(([key, title, fits]) => ({ key, title, fits, count: images.filter(fits).length }));
  const sorts = [
    ["doubt", "doubt, worst first", (one) => -(one.fields[DOUBT] ?? -1), true],
    ["agreement", "agreement, least first", known(AGREEMENT), has(AGREEMENT)],
    ["stable", "confidence, least first", known(STABLE), has(STABLE)],
    ["iou", "IoU with the ground truth, least first", known(IOU), has(IOU)],
    ["disputed", "disputed tags, clearest first", (one) => -gap(one), images.some(gap)],
    ["coverage", "coverage, least first", known(COVERAGE), has(COVERAGE)],
    ["covered", "coverage, most first", (one) => -(one.fields[COVERAGE] ?? -1), has(COVERAGE)],
    ["parts", "number of parts, most first", (one) => -(one.fields[PARTS] ?? -1), has(PARTS)],
    ["name", "name", null, true],
  ].filter((entry) => entry[3]);

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const options = (select, entries) => entries.forEach(([value, text]) => select.append(new Option(text, value)));
  options($("kind"), kinds.filter(({ count }, place) => count || !place).map(({ key, title, count }) => [key, `${title} (${count})`]));
  options($("sort"), sorts.map(([key, title]) => [key, title]));
  options($("split"), [["", "all"], ...[...new Set(images.flatMap(({ fields }) => fields[SPLITS].split(";")))].map((s) => [s, s])]);
  options($("layer"), data.layers.map((name, place) => [place, name]).filter(([place]) => images.some(({ fields }) => fields[LAYERS].includes(place))));

  const file = (number) => `page/${String(Math.floor(number / 1000)).padStart(3, "0")}/${String(number).padStart(6, "0")}`;
  // Layers lie one below the other in one file: a background's place chooses one of them.
  const show = (layer, url, place, count) => {
    layer.style.backgroundImage = `url("${url}")`;
    layer.style.backgroundSize = `100% ${100 * count}%`;
    layer.style.backgroundPosition = `0 ${count > 1 ? (100 * place) / (count - 1) : 0}%`;
  };
  const picture = ({ fields, number }, layer) => {
    const pic = element("div", "pic");
    pic.style.aspectRatio = `${fields[WIDTH]} / ${fields[HEIGHT]}`;
    pic.style.width = `${Math.min(100, (100 * fields[WIDTH]) / fields[HEIGHT])}%`;
    const photo = element("img");
    photo.loading = "lazy";
    photo.alt = "";
    photo.src = `${file(number)}.jpg`;
    pic.append(photo);
    const place = fields[LAYERS].indexOf(layer);
    if (place >= 0) {
      const over = element("i");
      show(over, `${file(number)}.png`, place, fields[LAYERS].length);
      pic.append(over);
    }
    return pic;
  };
  const percent = (value) => `${(value / 10).toFixed(value < 100 ? 1 : 0)} %`;
  const legend = (present) => {
    const made = element("div", "legend");
    present.forEach(([label, share]) => {
      const entry = element("span");
      const dot = element("span", "dot");
      dot.style.background = data.colors[label];
      entry.append(dot, `${data.classes[label]} ${percent(share)}`);
      made.append(entry);
    });
    if (!present.length) made.append(element("span", "none", "background alone"));
    return made;
  };
  const dispute = ([label, tagged, p]) =>
    tagged ? `${data.classes[label]}? tagged, p ${(p / 1000).toFixed(2)}` : `${data.classes[label]}? no tag, p ${(p / 1000).toFixed(2)}`;
  const flags = (fields, all) => {
    const made = element("div", "flags");
    const add = (text, bad) => made.append(element("span", bad ? "bad" : "", text));
    if (fields[EMPTY]) add("empty", true);
    if (fields[COVERING]) add("covers everything", true);
    fields[DISPUTED].slice(0, all ? undefined : 1).forEach((one) => add(dispute(one), true));
    if (fields[AGREEMENT] !== null) add(`agree ${(fields[AGREEMENT] / 1000).toFixed(2)}`);
    else if (fields[STABLE] !== null) add(`stable ${(fields[STABLE] / 1000).toFixed(2)}`);
    if (fields[IOU] !== null) add(`IoU ${(fields[IOU] / 1000).toFixed(2)}`);
    if (fields[PARTS] > 4) add(`${fields[PARTS]} parts`);
    if (fields[TAGS] === null) add("tags unknown");
    return made;
  };
  const card = (one, layer) => {
    const { fields } = one;
    const made = element("button", "card");
    made.type = "button";
    const frame = element("div", "frame");
    frame.append(picture(one, layer));
    const about = element("div", "about");
    const name = element("div", "name", fields[ID]);
    name.title = fields[ID];
    about.append(name);
    if (fields[COVERAGE] === null) about.append(element("div", "none", "no mask"));
    else about.append(legend(fields[PRESENT]));
    about.append(flags(fields));
    made.append(frame, about);
    made.addEventListener("click", () => open(one));
    return made;
  };
  const open = (one) => {
    const { fields } = one;
    const views = element("div", "views");
    [-1, ...fields[LAYERS]].forEach((layer) => {
      const view = element("figure");
      view.append(picture(one, layer), element("figcaption", "", layer < 0 ? "image" : data.layers[layer]));
      views.append(view);
    });
    const facts = element("ul", "facts");
    const fact = (text) => facts.append(element("li", "", text));
    fact(`split ${fields[SPLITS].replaceAll(";", ", ")}, ${fields[WIDTH]} x ${fields[HEIGHT]} pixels`);
    fact(fields[TAGS] === null ? "tags unknown" : `tags: ${fields[TAGS].map((label) => data.classes[label]).join(", ") || "none of the classes"}`);
    if (fields[COVERAGE] !== null) fact(`${percent(fields[COVERAGE])} of the image is labelled, in ${fields[PARTS]} ${fields[PARTS] === 1 ? "part" : "parts"}`);
    if (fields[STABLE] !== null) fact(`confidence ${(fields[STABLE] / 1000).toFixed(2)}: IoU of the seeds around the threshold`);
    $("viewed").replaceChildren(element("h3", "", fields[ID]), views, legend(fields[PRESENT]), flags(fields, true), facts);
    $("view").showModal();
  };

  let page = 0;
  let shown = [];
  const draw = () => {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(page, pages - 1);
    const layer = Number($("layer").value);
    const cards = shown.slice(page * PAGE, (page + 1) * PAGE).map((one) => card(one, layer));
    $("cards").replaceChildren(...(cards.length ? cards : [element("p", "empty", "No image fits; choose another class or kind.")]));
    $("where").textContent = `page ${page + 1} of ${pages}`;
    $("before").disabled = page === 0;
    $("after").disabled = page === pages - 1;
  };
  const update = () => {
    const [chosen, split, text] = [$("class").value, $("split").value, $("search").value.toLowerCase()];
    const { fits } = kinds.find(({ key }) => key === $("kind").value);
    const label = Number(chosen);
    shown = images.filter((one) => {
      const { fields } = one;
      const ofClass = chosen === "" || fields[TAGS]?.includes(label) || fields[PRESENT].some(([present]) => present === label);
      return fits(one) && ofClass && (!split || fields[SPLITS].split(";").includes(split)) && fields[ID].toLowerCase().includes(text);
    });
    const [, , key] = sorts.find(([name]) => name === $("sort").value);
    if (key) {
      // Infinity less itself is no number.
      const keys = new Map(shown.map((one) => [one, key(one)]));
      shown.sort((a, b) => (keys.get(a) === keys.get(b) ? a.number - b.number : keys.get(a) < keys.get(b) ? -1 : 1));
    } else shown.sort((a, b) => (a.fields[ID] < b.fields[ID] ? -1 : 1));
    $("count").textContent = `${shown.length} of ${images.length} images`;
    page = 0;
    draw();
  };
  const turn = (step) => {
    page += step;
    draw();
    $("images").scrollIntoView();
  };
  $("bar").addEventListener("submit", (event) => event.preventDefault());
  ["class", "kind", "split", "sort"].forEach((id) => $(id).addEventListener("change", update));
  $("search").addEventListener("input", update);
  $("layer").addEventListener("change", draw);
  $("opacity").addEventListener("input", () => document.documentElement.style.setProperty("--opacity", $("opacity").value / 100));
  $("before").addEventListener("click", () => turn(-1));
  $("after").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => $("view").close());
  $("view").addEventListener("click", (event) => event.target === $("view") && $("view").close());
  document.querySelectorAll("[data-sheet]").forEach((layer) => {
    const { sheet, layer: place, layers } = layer.dataset;
    show(layer, sheet, Number(place), Number(layers));
  });
  update();
})();
