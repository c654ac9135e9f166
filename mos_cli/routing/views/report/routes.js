// Numbers: the decisions of a branch, unpacked, and queries of them.
// Letters as in Python: S steps, J blocks, T tokens, K kept layers, M layers.

/** Bytes from base64 of zlib. */
async function unpack(text) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) bytes[at] = letters.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** One guidance branch of one trace. `row` numbers below are those of the branch's rows. */
class Branch {
  static async read(name, held, trace, rows, side) {
    const branch = new Branch();
    Object.assign(branch, { name, trace, prompt: held.prompt, steered: held.steered, changed: held.changed });
    branch.S = held.steps.length;
    branch.J = trace.blocks;
    branch.T = held.tokens.length;
    branch.K = held.kept;
    branch.M = trace.layers.length;
    branch.steps = held.steps;
    branch.tokens = held.tokens;
    branch.scales = held.scales;
    branch.rows = rows.map((row) => row.tokens[side]);
    branch.everyone = [...held.tokens.keys()];
    branch.ids = await unpack(held.ids);
    branch.weights = await unpack(held.weights);
    if (held.regions) branch.regions = { ...held.regions, parts: await unpack(held.regions.parts) };
    branch.volumes = new Map();
    return branch;
  }

  /** The weight of a word in the prompt, in text; empty where it is 1. */
  scale(row) {
    const held = [...new Set(this.rows[row].map((t) => this.scales[t]))].sort((a, b) => a - b);
    if (held.length === 1) return held[0] === 1 ? "" : `${held[0]}`;
    return `${held[0]} to ${held.at(-1)}`;
  }

  /** Which of the branch's own steps a step of the run is; -1 where the branch was not computed. */
  column(step) {
    return this.steps.indexOf(step);
  }

  /** The layers kept in one decision, the strongest first: [layer, weight from 0 to 1]. */
  kept(s, j, t) {
    const found = [];
    for (let k = 0; k < this.K; k++) {
      const place = ((j * this.T + t) * this.K + k) * this.S + s;
      if (this.weights[place]) found.push([this.ids[place], this.weights[place] / 255]);
    }
    return found;
  }

  /** The layer that a token reads in a block, the mean by weight. */
  mean(s, j, t) {
    let sum = 0, whole = 0;
    for (let k = 0; k < this.K; k++) {
      const place = ((j * this.T + t) * this.K + k) * this.S + s;
      sum += this.ids[place] * this.weights[place];
      whole += this.weights[place];
    }
    return whole ? sum / whole : NaN;
  }

  /** The weight that a row's tokens (null: all tokens) give to each layer, as [S, J, M]. */
  volume(row) {
    if (!this.volumes.has(row)) {
      const { S, J, T, K, M } = this;
      const sums = new Float32Array(S * J * M);
      for (const t of row === null ? this.everyone : this.rows[row]) {
        for (let j = 0; j < J; j++) {
          for (let k = 0; k < K; k++) {
            const start = ((j * T + t) * K + k) * S;
            for (let s = 0; s < S; s++) sums[(s * J + j) * M + this.ids[start + s]] += this.weights[start + s];
          }
        }
      }
      this.volumes.set(row, sums);
    }
    return this.volumes.get(row);
  }

  /** Shares of the layers in each block, [J][M], at column s or (s null) over all steps; a block's sum to 1. */
  byBlock(row, s) {
    const { S, J, M } = this, sums = this.volume(row);
    return Array.from({ length: J }, (_, j) => {
      const use = new Float64Array(M);
      for (let at = s ?? 0; at <= (s ?? S - 1); at++) {
        for (let m = 0; m < M; m++) use[m] += sums[(at * J + j) * M + m];
      }
      return shares(use);
    });
  }

  /** Shares of the layers over all blocks and steps. */
  overall(row) {
    return this.atStep(row, null);
  }

  /** Shares of the layers over all blocks at column s or (s null) over all steps; blocks count alike. */
  atStep(row, s) {
    const use = new Float64Array(this.M);
    for (const block of this.byBlock(row, s)) block.forEach((share, m) => (use[m] += share));
    return shares(use);
  }

  /** The layer each token reads on average over the blocks, by weight, as [T, S]; counted once. */
  levels() {
    if (!this.means) {
      const { S, J, T, K } = this;
      this.means = new Float32Array(T * S);
      const wholes = new Float32Array(T * S);
      for (let j = 0, place = 0; j < J; j++) {
        for (let t = 0; t < T; t++) {
          for (let k = 0; k < K; k++) {
            for (let s = 0; s < S; s++, place++) {
              this.means[t * S + s] += this.ids[place] * this.weights[place];
              wholes[t * S + s] += this.weights[place];
            }
          }
        }
      }
      this.means.forEach((sum, at) => (this.means[at] = sum / wholes[at]));
    }
    return this.means;
  }

  /** The layer a row reads on average at column s, its tokens alike. */
  level(row, s) {
    const means = this.levels();
    return this.rows[row].reduce((sum, t) => sum + means[t * this.S + s], 0) / this.rows[row].length;
  }

  /** The share of a patch's attention that goes to a row's word, mean over blocks and steps. */
  attention(row, patch) {
    const { rows, columns, peaks, parts } = this.regions;
    return (parts[row * rows * columns + patch] / 255) * peaks[row];
  }
}

function shares(use) {
  const whole = use.reduce((sum, part) => sum + part, 0) || 1;
  return use.map((part) => part / whole);
}

/** What two shares of layers do not have in common: 0 the same layers, 1 none. */
function apart(a, b) {
  return 1 - a.reduce((sum, share, m) => sum + Math.min(share, b[m]), 0);
}

/** Layers by their share, the largest first. */
function ranked(use) {
  return [...use.keys()].filter((m) => use[m] > 0).sort((a, b) => use[b] - use[a]);
}

const percent = (share) => (share > 0 && share < 0.005 ? "<1" : Math.round(100 * share)) + "\u202f%";
const level = (value) => value.toFixed(1);
