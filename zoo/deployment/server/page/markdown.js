// The few parts of Markdown that a model card is written in, as elements with text; nothing in it is ever taken for markup
// or for an address to go to.

/** Return the elements of one line: `code`, **bold**, and what a backslash keeps from meaning anything. */
function inline(text, into) {
  const pattern = /\\([!-/:-@[-`{-~])|(`+)(.+?)\2(?!`)|\*\*(.+?)\*\*/g;
  let from = 0, plain = "";
  const flush = () => { if (plain) into.append(plain); plain = ""; };
  for (const found of text.matchAll(pattern)) {
    plain += text.slice(from, found.index);
    from = found.index + found[0].length;
    if (found[1] !== undefined) { plain += found[1]; continue; }
    flush();
    const made = document.createElement(found[2] ? "code" : "strong");
    if (found[2]) made.textContent = found[3].trim() || found[3]; else inline(found[4], made);
    into.append(made);
  }
  plain += text.slice(from);
  flush();
  return into;
}

const element = (kind, text) => inline(text, document.createElement(kind));
const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((part) => part.trim());
const RULE = /^\s*\|?[\s:|-]*-[\s:|-]*\|?\s*$/;

function table(lines) {
  const made = document.createElement("table"), head = made.createTHead().insertRow(), body = made.createTBody();
  for (const text of cells(lines[0])) {
    const name = element("th", text);
    name.scope = "col";
    head.append(name);
  }
  for (const line of lines.slice(2)) body.insertRow().append(...cells(line).map((text) => element("td", text)));
  return made;
}

/** Return a fragment of headings (from h3 on, for the page has its own), lists, tables, code and paragraphs. */
export function renderMarkdown(text) {
  const made = document.createDocumentFragment(), lines = String(text).split(/\r?\n/);
  const until = (at, goes) => { let end = at; while (end < lines.length && goes(lines[end], end)) end += 1; return end; };
  const special = (line) => /^(#{1,6} |[-*] |```|\|)/.test(line) || !line.trim();
  for (let at = 0; at < lines.length;) {
    const line = lines[at], heading = /^(#{1,6}) (.*)$/.exec(line);
    let end = at + 1;
    if (heading) made.append(element(`h${Math.min(6, heading[1].length + 2)}`, heading[2]));
    else if (line.startsWith("```")) {
      end = until(at + 1, (each) => !each.startsWith("```"));
      const code = document.createElement("code"), box = document.createElement("pre");
      code.textContent = lines.slice(at + 1, end).join("\n");
      box.append(code);
      made.append(box);
      end += 1;
    } else if (/^[-*] /.test(line)) {
      end = until(at, (each) => /^([-*] |  \S)/.test(each));
      const items = lines.slice(at, end).reduce((all, each) => /^[-*] /.test(each) ? [...all, each.slice(2)] : [...all.slice(0, -1), `${all.at(-1)} ${each.trim()}`], []);
      const list = document.createElement("ul");
      list.append(...items.map((item) => element("li", item)));
      made.append(list);
    } else if (line.startsWith("|") && RULE.test(lines[at + 1] ?? "")) {
      end = until(at, (each) => each.startsWith("|"));
      made.append(table(lines.slice(at, end)));
    } else if (line.trim()) {
      end = until(at + 1, (each) => !special(each));
      made.append(element("p", lines.slice(at, end).map((each) => each.trim()).join(" ")));
    }
    at = end;
  }
  return made;
}
