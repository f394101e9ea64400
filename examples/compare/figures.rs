//! What was measured: kept as a CSV file, shown as Markdown tables.
//!
//! Owns `figures.csv` and the parts of `README.md` between `<!-- NAME -->` and `<!-- /NAME -->`. A run replaces the figures of what it has
//! measured again and keeps the others, so that a long comparison can be made in parts. Absent: plots (`plot`), and prose.

use std::path::Path;

use anyhow::Context as _;

/// One figure of one round.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub work: String,
    /// What varies within the work: clients, keys, an event.
    pub case: String,
    pub server: String,
    pub round: u32,
    pub metric: &'static str,
    pub value: f64,
}

/// Every metric, with its unit as tables say it.
const METRICS: &[(&str, &str)] = &[
    ("cpu_us", "server CPU µs"),
    ("per_s", "a second"),
    ("p50_ms", "p50 ms"),
    ("p99_ms", "p99 ms"),
    ("p999_ms", "p99.9 ms"),
    ("max_ms", "max ms"),
    ("client_cpu_us", "client CPU µs"),
    ("seconds", "seconds"),
    ("resident_mib", "resident MiB"),
    ("disk_mib", "disk MiB"),
    ("bytes_each", "bytes each"),
    ("allocations", "allocations each"),
    ("count", "count"),
];

/// A table of the README: its name, the works in it, and what it shows of them.
pub struct Table {
    pub name: &'static str,
    pub works: &'static [&'static str],
    pub metrics: &'static [&'static str],
}

pub const TABLES: &[Table] = &[
    Table { name: "cost", works: crate::short::WORKS, metrics: &["cpu_us", "per_s", "p99_ms"] },
    Table { name: "latency", works: crate::short::WORKS, metrics: &["p50_ms", "p999_ms", "max_ms"] },
    Table { name: "allocations", works: &["allocations"], metrics: &["allocations", "bytes_each"] },
    Table { name: "load", works: &["load"], metrics: &["seconds", "cpu_us", "resident_mib", "disk_mib"] },
    Table { name: "restart", works: &["restart"], metrics: &["seconds", "resident_mib"] },
    Table { name: "pauses", works: &["pause"], metrics: &["p99_ms", "p999_ms", "max_ms", "seconds"] },
    Table { name: "long", works: crate::long::WORKS, metrics: &["seconds", "p99_ms", "max_ms"] },
    Table { name: "memory", works: &["memory"], metrics: &["bytes_each", "resident_mib"] },
    Table { name: "scale", works: crate::scale::WORKS, metrics: &["cpu_us", "per_s", "p99_ms"] },
];

/// The figures of all rounds of one thing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub least: f64,
    pub median: f64,
    pub most: f64,
}

#[derive(Default)]
pub struct Figures(Vec<Sample>);

impl Figures {
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("figures.csv");
        let text = if path.exists() { std::fs::read_to_string(&path)? } else { String::new() };
        let sample = |line: &str| -> Option<Sample> {
            let [work, case, server, round, metric, value] = line.split(',').collect::<Vec<_>>().try_into().ok()?;
            let (metric, _) = METRICS.iter().find(|(name, _)| *name == metric)?;
            let (round, value) = (round.parse().ok()?, value.parse().ok()?);
            Some(Sample { work: work.into(), case: case.into(), server: server.into(), round, metric, value })
        };
        let samples =
            text.lines().skip(1).map(|line| sample(line).with_context(|| format!("{}: {line}", path.display())));
        Ok(Self(samples.collect::<anyhow::Result<_>>()?))
    }

    pub fn save(&self, dir: &Path) -> anyhow::Result<()> {
        let line = |s: &Sample| format!("{},{},{},{},{},{:.3}\n", s.work, s.case, s.server, s.round, s.metric, s.value);
        let text = format!("work,case,server,round,metric,value\n{}", self.0.iter().map(line).collect::<String>());
        Ok(std::fs::write(dir.join("figures.csv"), text)?)
    }

    pub fn push(&mut self, sample: Sample) {
        self.0.push(sample);
    }

    /// Takes what was measured anew, in the place of what was known of the same works, cases and servers.
    pub fn replace(&mut self, new: Self) {
        let same = |a: &Sample, b: &Sample| (&a.work, &a.case, &a.server) == (&b.work, &b.case, &b.server);
        self.0.retain(|old| !new.0.iter().any(|new| same(new, old)));
        self.0.extend(new.0);
    }

    /// The cases of a work, in the order in which they were measured; numbers ascend.
    pub fn cases(&self, work: &str) -> Vec<&str> {
        let mut cases: Vec<&str> = Vec::new();
        for sample in self.0.iter().filter(|sample| sample.work == work) {
            if !cases.contains(&sample.case.as_str()) {
                cases.push(&sample.case);
            }
        }
        cases.sort_by_key(|case| case.split(' ').next().and_then(|number| number.parse::<u64>().ok()));
        cases
    }

    /// The servers that were measured: ours, then those that it is compared with.
    pub fn servers(&self) -> Vec<&str> {
        let mut servers: Vec<&str> = self.0.iter().map(|sample| sample.server.as_str()).collect();
        servers.sort_by_key(|server| (*server != crate::OURS, *server));
        servers.dedup();
        servers
    }

    pub fn spread(&self, work: &str, case: &str, server: &str, metric: &str) -> Option<Spread> {
        let wanted = |s: &&Sample| (&*s.work, &*s.case, &*s.server, s.metric) == (work, case, server, metric);
        let mut values: Vec<f64> = self.0.iter().filter(wanted).map(|sample| sample.value).collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Spread { least, median, most })
    }

    /// A row a case, and for every metric a column a server; with two servers, also what ours is of the other's. Empty without figures.
    pub fn table(&self, table: &Table) -> String {
        let servers = self.servers();
        let compared = servers.len() == 2;
        let mut head = vec!["work".to_owned(), "case".to_owned()];
        for metric in table.metrics {
            let unit = METRICS.iter().find(|(name, _)| name == metric).map_or(*metric, |(_, unit)| unit);
            head.extend(servers.iter().map(|server| format!("{unit}: {server}")));
            head.extend(compared.then(|| "ratio".to_owned()));
        }
        let mut rows = Vec::new();
        for work in table.works {
            for case in self.cases(work) {
                let mut row = vec![(*work).to_owned(), case.to_owned()];
                for metric in table.metrics {
                    let spreads: Vec<_> = servers.iter().map(|s| self.spread(work, case, s, metric)).collect();
                    row.extend(spreads.iter().map(|spread| spread.map_or(String::new(), Spread::text)));
                    let ratio = if let [Some(ours), Some(other)] = spreads[..] {
                        Some(ours.median / other.median)
                    } else {
                        None
                    };
                    row.extend(compared.then(|| ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"))));
                }
                // A case without any of these metrics belongs to another table.
                if row[2..].iter().any(|cell| !cell.is_empty()) {
                    rows.push(row);
                }
            }
        }
        if rows.is_empty() {
            return String::new();
        }
        let rule = head.iter().enumerate().map(|(n, _)| if n < 2 { "---" } else { "---:" }.to_owned()).collect();
        let lines = [vec![head, rule], rows].concat();
        lines.iter().map(|cells| format!("| {} |\n", cells.join(" | "))).collect()
    }
}

impl Spread {
    /// The median, and the range of all rounds where there is one.
    fn text(self) -> String {
        let (least, median, most) = (number(self.least), number(self.median), number(self.most));
        if least == most { median } else { format!("{median} ({least}–{most})") }
    }
}

/// Three digits, or all before the point.
pub fn number(value: f64) -> String {
    match value.abs() {
        x if x >= 99.95 => {
            let (sign, digits) = (if value < 0.0 { "-" } else { "" }, format!("{x:.0}"));
            let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
            format!("{sign}{}", groups.collect::<Vec<_>>().join(","))
        }
        x if x >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Replaces what stands between the marks of `name` in the README of `dir`; where there are none, adds them at its end.
pub fn fill_in(dir: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let path = dir.join("README.md");
    let readme = if path.exists() { std::fs::read_to_string(&path)? } else { String::new() };
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->\n"));
    let (before, after) = match readme.split_once(&begin) {
        Some((before, rest)) => {
            (before, rest.split_once(&end).with_context(|| format!("no {end} in {}", path.display()))?.1)
        }
        None => (&*readme, ""),
    };
    Ok(std::fs::write(path, format!("{before}{begin}\n{text}\n{end}{after}"))?)
}
