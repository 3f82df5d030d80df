// The Markdown that answers are full of, as it comes: fenced code, headings, bold, code within a line.
// Only elements with text are made, never markup out of text; all else stays as it was written.

const FENCE = /^\s*(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^#{1,6}\s+(.+?)\s*#*$/;
const INLINE = /(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)|\*\*(?=\S)(.+?)\*\*/g;
const LONG = 2000; // characters of a line that is not read anew with every piece

export class Markdown {
  #into;
  #line = ""; // the last one, which may go on
  #shown = null; // how it is shown meanwhile
  #block = null; // what further lines are added to: a paragraph or code
  #fence = null; // what ends the code

  constructor(into) {
    this.#into = into;
  }

  feed(text) {
    const lines = text.split("\n");
    const last = lines.pop();
    for (const line of lines) {
      this.#add(this.#line + line);
      this.#line = "";
    }
    this.#line += last;
    if (this.#line) this.#show(last);
  }

  finish() {
    if (this.#line) this.#add(this.#line);
    this.#line = "";
  }

  #add(line) {
    this.#clear();
    const fence = FENCE.exec(line);
    if (this.#fence !== null) {
      if (fence && fence[1].startsWith(this.#fence) && !fence[2]) this.#fence = this.#block = null;
      else this.#block.append(`${line}\n`);
    } else if (fence) {
      this.#fence = fence[1];
      const frame = this.#make("pre");
      frame.tabIndex = 0; // may be wider than the page, and is then moved with the keyboard
      if (fence[2]) frame.dataset.language = fence[2].trim();
      this.#block = document.createElement("code");
      frame.append(this.#block);
    } else if (!line.trim()) {
      this.#block = null;
    } else if (HEADING.test(line)) {
      this.#make("h3").append(...inline(HEADING.exec(line)[1]));
      this.#block = null;
    } else {
      this.#continue(this.#paragraph(), inline(line));
    }
  }

  #show(added) {
    if (this.#shown !== null && this.#line.length > LONG) {
      this.#shown.append(added);
      return;
    }
    this.#clear();
    this.#shown = document.createElement("span");
    if (this.#fence !== null) this.#block.append(this.#shown);
    else this.#continue(this.#paragraph(), [this.#shown]);
    this.#shown.append(...(this.#fence !== null ? [this.#line] : inline(this.#line)));
  }

  /** Take back what was shown of an unfinished line, and the paragraph that was begun for it. */
  #clear() {
    if (this.#shown === null) return;
    if (this.#fence === null) this.#shown.previousSibling?.remove(); // the break before it
    this.#shown.remove();
    this.#shown = null;
    if (this.#fence === null && !this.#block.hasChildNodes()) {
      this.#block.remove();
      this.#block = null;
    }
  }

  #continue(paragraph, nodes) {
    if (paragraph.hasChildNodes()) paragraph.append(document.createTextNode("\n"));
    paragraph.append(...nodes);
  }

  #paragraph() {
    return (this.#block ??= this.#make("p"));
  }

  #make(name) {
    const element = document.createElement(name);
    this.#into.append(element);
    return element;
  }
}

function inline(line) {
  const nodes = [];
  let end = 0;
  for (const found of line.matchAll(INLINE)) {
    nodes.push(line.slice(end, found.index));
    const node = document.createElement(found[1] ? "code" : "strong");
    node.textContent = found[1] ? found[2] : found[3];
    nodes.push(node);
    end = found.index + found[0].length;
  }
  nodes.push(line.slice(end));
  return nodes.filter((node) => node !== "");
}
