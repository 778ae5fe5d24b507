"use strict";
// The ranking over any of a section's tasks: what ranking.py computes, on the replicates that the page carries.
// Sums of int16 are exact, so ties and signs are those of Python; only the step (page_data.py) rounds.
const ranking = (() => {
  const UNDEFINED = -32768;

  function decode(text) {
    const bytes = atob(text), view = new DataView(new ArrayBuffer(bytes.length));
    for (let place = 0; place < bytes.length; place++) view.setUint8(place, bytes.charCodeAt(place));
    const numbers = new Int16Array(bytes.length / 2);
    for (let place = 0; place < numbers.length; place++) numbers[place] = view.getInt16(2 * place, true);
    return numbers;
  }

  // Decoded once a section: numbers [E, T, R], and of each task the shares of encoders beaten, a replicate each.
  function open(section) {
    section.opened ??= { numbers: decode(section.replicates.values), shares: new Map(), ranked: "" };
    return section.opened;
  }

  function normalise(value, task) { return (value - task.chance) / (task.perfect - task.chance); }

  // numpy's linear percentile of sorted values.
  function percentile(sorted, share) {
    const at = share * (sorted.length - 1), low = Math.floor(at), part = at - low;
    const a = sorted[low], b = sorted[Math.min(low + 1, sorted.length - 1)];
    return part < 0.5 ? a + (b - a) * part : b - (b - a) * (1 - part);
  }

  function computeInterval(values, numGroups, maxUndefined) {
    const defined = values.filter(value => !Number.isNaN(value)), undefinedOnes = values.length - defined.length;
    if (numGroups < 2) return { low: null, high: null,
      reason: `no interval: ${numGroups} test group, at least 2 are needed` };
    if (undefinedOnes > maxUndefined * values.length) return { low: null, high: null,
      reason: `no interval: undefined in ${undefinedOnes} of ${values.length} bootstrap samples` };
    defined.sort();
    return { low: percentile(defined, 0.025), high: percentile(defined, 0.975), reason: null };
  }

  // Whether the 2.5 percentile of theirs - ours is above zero: counted, as sorting every pair would be slow.
  function isSurelyHigher(theirs, ours, maxUndefined) {
    const most = Math.floor(0.025 * (ours.length - 1)) + 1;
    let notAbove = 0, numUndefined = 0, largestBelow = -Infinity, smallestAbove = Infinity;
    for (let place = 0; place < ours.length; place++) {
      const gap = theirs[place] - ours[place];
      if (Number.isNaN(gap)) numUndefined++;
      else if (gap > 0) { if (gap < smallestAbove) smallestAbove = gap; }
      else { if (++notAbove > most) return false; if (gap > largestBelow) largestBelow = gap; }
    }
    if (numUndefined > maxUndefined * ours.length) return false;
    const at = 0.025 * (ours.length - numUndefined - 1), low = Math.floor(at);
    if (notAbove !== low + 1) return notAbove <= low;
    return percentile([largestBelow, smallestAbove], at - low) > 0;
  }

  // Twice the number of the others that each beats, ties half, into `out` at `offset + e * stride`.
  function countBeaten(values, keys, out, offset, stride) {
    const size = values.length;
    for (let e = 0; e < size; e++) keys[e] = (values[e] - UNDEFINED) * size + e;
    keys.sort();
    for (let first = 0; first < size;) {
      const value = Math.floor(keys[first] / size);
      let last = first;
      while (last + 1 < size && Math.floor(keys[last + 1] / size) === value) last++;
      for (let place = first; place <= last; place++) out[offset + (keys[place] % size) * stride] = first + last;
      first = last + 1;
    }
  }

  function getShares(section, rows, place) {
    const opened = open(section), R = section.replicates.num_replicates, T = section.tasks.length, E = rows.length;
    if (opened.ranked !== rows.join()) { opened.shares.clear(); opened.ranked = rows.join(); }
    if (!opened.shares.has(place)) {
      const shares = new Uint16Array(E * R), values = new Int16Array(E), keys = new Float64Array(E);
      for (let r = 0; r < R; r++) {
        for (let e = 0; e < E; e++) values[e] = opened.numbers[(rows[e] * T + place) * R + r];
        countBeaten(values, keys, shares, r, R);
      }
      opened.shares.set(place, shares);
    }
    return opened.shares.get(place);
  }

  // Sums over tasks of each encoder's replicates, in steps; NaN where one is undefined.
  function sumReplicates(section, row, places, hasInterval) {
    const { numbers } = open(section), R = section.replicates.num_replicates, T = section.tasks.length;
    const sums = new Float64Array(R);
    if (!hasInterval) return sums.fill(NaN);
    for (const place of places) {
      const start = (row * T + place) * R;
      for (let r = 0; r < R; r++) { const number = numbers[start + r]; sums[r] += number === UNDEFINED ? NaN : number; }
    }
    return sums;
  }

  function sumShares(section, rows, places) {
    const total = new Int32Array(rows.length * section.replicates.num_replicates);
    for (const place of places) {
      const shares = getShares(section, rows, place);
      for (let at = 0; at < total.length; at++) total[at] += shares[at];
    }
    return total;
  }

  // Rank by Borda in every defined replicate, 1 + the number of those with more: [E][R'].
  function rankReplicates(shares, E, R, defined) {
    const ranks = Array.from({ length: E }, () => new Float64Array(defined.length)), column = new Int32Array(E);
    defined.forEach((r, at) => {
      for (let e = 0; e < E; e++) column[e] = -shares[e * R + r];
      const sorted = column.slice().sort(), first = new Map();
      sorted.forEach((value, place) => { if (!first.has(value)) first.set(value, place + 1); });
      for (let e = 0; e < E; e++) ranks[e][at] = first.get(column[e]);
    });
    return ranks;
  }

  function invertedCdf(sorted, share) { return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)]; }

  function explain(tasks) {
    const without = tasks.filter(task => task.no_interval).map(task => task.title);
    if (without.length) return `no interval: the metric of ${without.join(", ")} has none`;
    const few = tasks.filter(task => task.few_groups).length;
    return few ? `interval outside its declared regime: ${few} of ${tasks.length} tasks have few groups in the ` +
    `rarer class` : null;
  }

  // Rank the rows of a section that have all tasks at `places`: {standings: row number -> standing, isAbove(a, b)}.
  function rank(section, allTasks, places, maxUndefined) {
    const tasks = places.map(place => allTasks[section.tasks[place]]), R = section.replicates.num_replicates;
    const isMeasured = cell => cell.value !== undefined && cell.origin !== "self_reported"; // no predictions, no rank
    const has = row => places.every(place => isMeasured(section.rows[row].cells[place]));
    const rows = section.rows.map((_, row) => row).filter(has), E = rows.length, standings = new Map();
    if (!places.length || E < 2) return { standings, isAbove: () => false };
    const hasInterval = !tasks.some(task => task.no_interval), reason = explain(tasks);
    const numGroups = Math.min(...tasks.map(task => task.num_groups));
    const sums = rows.map(row => sumReplicates(section, row, places, hasInterval));
    const defined = Array.from({ length: R }, (_, r) => r).filter(r => sums.every(values => !Number.isNaN(values[r])));
    const shares = sumShares(section, rows, places), rankOf = rankReplicates(shares, E, R, defined);
    const points = rows.map(row => tasks.map((task, at) => normalise(section.rows[row].cells[places[at]].value, task)));
    const scale = section.replicates.step / places.length, whole = 2 * Math.max(1, E - 1) * places.length;
    const above = rows.map((_, ours) => rows.map((_, theirs) => numGroups > 1
      && isSurelyHigher(sums[theirs], sums[ours], maxUndefined)));
    rows.forEach((row, e) => {
      const interval = computeInterval(sums[e], numGroups, maxUndefined),
        known = interval.low !== null && defined.length > 0;
      const ranks = rankOf[e].sort(), ofRow = Float64Array.from(defined,
        r => E - shares[e * R + r] / whole * (E - 1)).sort();
      const beaten = tasks.reduce((sum, _, at) =>
        sum + points.reduce((count, other) => count + 2 * (other[at] < points[e][at]) + (other[at] === points[e][at]),
        -1), 0);
      standings.set(row, {
        rank: 1 + above[e].filter(Boolean).length,
        rank_low: known ? invertedCdf(ranks, 0.025) : null,
        rank_high: known ? invertedCdf(ranks, 0.975) : null,
        borda: beaten / whole,
        score: points[e].reduce((sum, point) => sum + point, 0) / places.length,
        score_low: interval.low === null ? null : interval.low * scale,
        score_high: interval.high === null ? null : Math.min(1, interval.high * scale),
        reason: reason ?? interval.reason,
        mean_rank: E - beaten / whole * (E - 1),
        mean_rank_low: known ? percentile(ofRow, 0.025) : null,
        mean_rank_high: known ? percentile(ofRow, 0.975) : null,
      });
    });
    const place = new Map(rows.map((row, e) => [row, e]));
    return { standings, isAbove: (a, b) => above[place.get(b)][place.get(a)] };
  }

  return { rank, normalise };
})();
