// Draws the charts of a page with Apache ECharts. The data of a chart are JSON in its attribute `data-chart`.
"use strict";
(() => {
  const colorNames = ["text", "soft", "panel", "line", "first", "second", "other"];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const escaped = (text) => String(text).replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
  // Four significant digits, and all digits of whole numbers.
  const short = (value) =>
    Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));

  // What all charts share.
  function frame(colors) {
    return {
      animation: false,
      textStyle: { color: colors.soft, fontFamily: "inherit" },
      grid: { left: 8, right: 16, top: 12, bottom: 26, containLabel: true },
      tooltip: {
        confine: true,
        backgroundColor: colors.panel,
        borderColor: colors.line,
        textStyle: { color: colors.text, fontSize: 12 },
      },
    };
  }

  function axis(colors, name, more) {
    return {
      name,
      nameLocation: "middle",
      nameGap: 24,
      nameTextStyle: { color: colors.soft },
      axisLabel: { color: colors.soft, hideOverlap: true },
      axisLine: { lineStyle: { color: colors.line } },
      splitLine: { lineStyle: { color: colors.line } },
      ...more,
    };
  }

  const drawings = {
    lines(chart, colors) {
      const series = chart.lines.map((line) => ({
        type: "line",
        name: line.name,
        data: line.points,
        showSymbol: line.marks,
        symbolSize: 5,
        color: colors[line.style],
        lineStyle: { width: line.style === "other" ? 1.25 : 1.75 },
      }));
      if (chart.marked) {
        const itemStyle = { color: "transparent", borderColor: colors.text, borderWidth: 1.75 };
        series.push({ type: "scatter", name: "in use", data: [chart.marked], symbolSize: 13, itemStyle });
      }
      return {
        ...frame(colors),
        tooltip: {
          ...frame(colors).tooltip,
          trigger: "item",
          formatter: ({ seriesName, value: [x, y] }) =>
            `${escaped(seriesName)}<br>${escaped(chart.x)} ${short(x)}: ${short(y)}`,
        },
        xAxis: axis(colors, chart.x, { type: "value", scale: true }),
        yAxis: axis(colors, "", { type: "value", scale: true }),
        series,
      };
    },

    bars(chart, colors) {
      return {
        ...frame(colors),
        tooltip: {
          ...frame(colors).tooltip,
          trigger: "axis",
          valueFormatter: (value) => (value === null ? "–" : short(value)),
        },
        xAxis: axis(colors, chart.x, { type: "category", data: chart.categories }),
        yAxis: axis(colors, "", { type: "value" }),
        series: chart.bars.map((bar) => ({ type: "bar", name: bar.name, data: bar.values, color: colors[bar.style] })),
      };
    },

    intervals(chart, colors) {
      const bars = chart.rows.map((row, place) => ({
        type: "line",
        name: row.name,
        data: [[row.low, place], [row.high, place]],
        symbol: "none",
        color: colors[row.style],
        silent: true,
      }));
      const points = {
        type: "scatter",
        data: chart.rows.map((row, place) => ({ value: [row.value, place], itemStyle: { color: colors[row.style] } })),
        symbolSize: 8,
        markLine: {
          silent: true,
          symbol: "none",
          label: { show: false },
          lineStyle: { color: colors.soft, type: "solid" },
          data: [{ xAxis: 0 }],
        },
      };
      return {
        ...frame(colors),
        tooltip: {
          ...frame(colors).tooltip,
          formatter: (at) => {
            const row = chart.rows[at.value[1]];
            return `${escaped(row.name)}: ${short(row.value)}<br>${short(row.low)} to ${short(row.high)}`;
          },
        },
        xAxis: axis(colors, chart.x, { type: "value", scale: true }),
        yAxis: axis(colors, "", {
          type: "value",
          min: -0.5,
          max: chart.rows.length - 0.5,
          interval: 1,
          inverse: true,
          splitLine: { show: false },
          axisTick: { show: false },
          axisLabel: {
            color: colors.soft,
            customValues: chart.rows.map((_, place) => place),
            formatter: (place) => chart.rows[place]?.name ?? "",
          },
        }),
        series: [...bars, points],
      };
    },

    map(chart, colors, wanted, width, height) {
      const found = (point) => wanted && point[3].toLowerCase().includes(wanted);
      const most = Math.max(1, ...chart.points.map((point) => point[2]));
      const size = (point) => 4 + 14 * Math.sqrt(point[2] / most);
      const parts = ["axisLabel", "axisLine", "axisTick", "splitLine"];
      const hidden = Object.fromEntries(parts.map((part) => [part, { show: false }]));
      // Room for the dots at the edge, and for the names to their right.
      const range = (values, after) => {
        const [least, greatest] = [Math.min(...values), Math.max(...values)];
        return { min: least - 0.03 * (greatest - least), max: greatest + after * (greatest - least) };
      };
      const x = range(chart.points.map((point) => point[0]), 0.1);
      const y = range(chart.points.map((point) => point[1]), 0.03);
      const label = { show: true, formatter: (at) => at.value[3], position: "right", color: colors.text, fontSize: 11 };
      // Points are sorted by frequency. Of names that would cover each other, the first is shown; sizes are estimates.
      const shown = (points, most) => {
        const boxes = [];
        return new Set(points.filter((point) => {
          const left = (width * (point[0] - x.min)) / (x.max - x.min);
          const middle = (height * (point[1] - y.min)) / (y.max - y.min);
          const box = [left, left + 16 + 6.5 * point[3].length, middle - 7, middle + 7];
          const covers = (other) => box[0] < other[1] && other[0] < box[1] && box[2] < other[3] && other[2] < box[3];
          const free = boxes.length < most && !boxes.some(covers);
          if (free) boxes.push(box);
          return free;
        }));
      };
      const series = (name, points, style, names) => ({
        type: "scatter",
        name,
        data: points.map((value) => (names.has(value) ? { value, label } : { value })),
        symbolSize: size,
        itemStyle: style,
      });
      const others = chart.points.filter((point) => !found(point));
      const named = chart.points.filter(found);
      return {
        ...frame(colors),
        grid: { left: 4, right: 4, top: 4, bottom: 4 },
        tooltip: {
          ...frame(colors).tooltip,
          formatter: (at) => `${escaped(at.value[3])}<br>${short(at.value[2])} training queries`,
        },
        xAxis: { type: "value", ...x, ...hidden },
        yAxis: { type: "value", ...y, ...hidden },
        dataZoom: [{ type: "inside", xAxisIndex: 0 }, { type: "inside", yAxisIndex: 0 }],
        series: [
          series("labels", others, { color: colors.first, opacity: wanted ? 0.25 : 0.65 }, shown(others, wanted ? 0 : 60)),
          series("found", named, { color: colors.second }, shown(named, 40)),
        ],
      };
    },
  };

  function draw(element) {
    const content = JSON.parse(element.dataset.chart);
    const chart = echarts.init(element, null, { renderer: "svg" });
    const search = document.querySelector(`input[data-searches="${element.id}"]`);
    const show = () => {
      const colors = Object.fromEntries(colorNames.map((name) => [name, css(name)]));
      const wanted = search?.value.trim().toLowerCase();
      chart.setOption(drawings[content.kind](content, colors, wanted, element.clientWidth, element.clientHeight), true);
      element.dataset.drawn = "yes";
    };
    show();
    search?.addEventListener("input", show);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    new ResizeObserver(() => chart.resize()).observe(element);
  }

  // A report has some thirty charts: each is drawn when it is about to be seen.
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((each) => each.isIntersecting)) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    },
    { rootMargin: "400px" },
  );
  for (const element of document.querySelectorAll("[data-chart]")) seen.observe(element);
  addEventListener("beforeprint", () => document.querySelectorAll("[data-chart]:not([data-drawn])").forEach(draw));
})();
