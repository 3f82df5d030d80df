// Figures as people read them; the same words as on the command line.

const rounded = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const KIB = 1024;

export const count = (number) => whole.format(number);
export const figure = (number) => (number >= 1000 ? whole : rounded).format(number);
export const share = (part) => `${whole.format(100 * part)} %`;

export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

export function size(bytes) {
  if (bytes >= KIB ** 3) return `${(bytes / KIB ** 3).toFixed(2)} GiB`;
  if (bytes >= KIB ** 2) return `${(bytes / KIB ** 2).toFixed(1)} MiB`;
  return bytes >= KIB ? `${whole.format(bytes / KIB)} KiB` : `${bytes} B`;
}

export function seconds(time) {
  return `${time < 10 ? time.toFixed(time < 1 ? 2 : 1) : whole.format(time)} s`;
}

export function range(speed) {
  return `${figure(speed.mid)} t/s (${figure(speed.low)}–${figure(speed.high)})`;
}

/** An element with text and classes. */
export function make(name, text = "", ...classes) {
  const element = document.createElement(name);
  element.textContent = text;
  element.classList.add(...classes);
  return element;
}
