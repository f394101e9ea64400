//! What a run has seen: counts by RPC and error, what was needed of the wanted differences, which planted faults it would have found.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Write as _;

use crate::call::{Call, Door};
use crate::compare::Difference;
use crate::errors::{ELSEWHERE, OCCUR, OCCUR_AMONG_USERS, REFUSED_ONLY};
use crate::planted::PLANTED;
use crate::wanted::Uses;
use crate::world::Answers;
use crate::{Found, unexplained};

/// Of each RPC that was sent so often, so many percent must succeed.
const OFTEN: u64 = 50;
const SUCCEED_PERCENT: u64 = 30;
/// The same where users ask, who may not do most of it.
const SUCCEED_PERCENT_OF_USERS: u64 = 5;

pub struct Report {
    pub uses: Uses,
    pub goes_on: bool,
    has_users: bool,
    /// The place in its sequence of the request that was played last.
    pub last_index: usize,
    /// By RPC and door: sent, and how many succeeded.
    calls: BTreeMap<(String, &'static str), (u64, u64)>,
    errors: BTreeMap<String, u64>,
    planted: BTreeSet<&'static str>,
    /// By RPC and field, with the first of its kind; only where a run goes on after a difference.
    differences: BTreeMap<(String, String), (u64, String)>,
}

impl Report {
    pub fn new(goes_on: bool, has_users: bool) -> Self {
        Self {
            uses: Uses::new(),
            goes_on,
            has_users,
            last_index: 0,
            calls: BTreeMap::new(),
            errors: BTreeMap::new(),
            planted: BTreeSet::new(),
            differences: BTreeMap::new(),
        }
    }

    pub fn note(&mut self, call: &Call, answers: &Answers, differences: &[Difference]) {
        let door = if call.door == Door::Json { "JSON" } else { "gRPC" };
        let (sent, succeeded) = self.calls.entry((call.method.clone(), door)).or_default();
        *sent += 1;
        match error(answers) {
            Some(text) => *self.errors.entry(text).or_default() += 1,
            None => *succeeded += 1,
        }
        self.note_all(call, differences);
        if differences.is_empty() {
            self.plant(call, answers);
        }
    }

    /// A request that could not be played to its end.
    pub fn note_broken(&mut self, call: &Call, broken: &Difference) {
        self.note_all(call, std::slice::from_ref(broken));
    }

    fn note_all(&mut self, call: &Call, differences: &[Difference]) {
        for difference in differences {
            let seen = self.differences.entry((call.method.clone(), difference.path.clone()));
            seen.or_insert_with(|| (0, format!("{}\n{difference}", call.line()))).0 += 1;
        }
    }

    /// Tries the planted faults that were not found yet on an answer that was given alike.
    fn plant(&mut self, call: &Call, answers: &Answers) {
        for (name, change) in PLANTED {
            if self.planted.contains(name) {
                continue;
            }
            let mut answers = answers.clone();
            if change(call, &mut answers.ours) && !unexplained(call, &answers, &mut Uses::new()).is_empty() {
                self.planted.insert(name);
            }
        }
    }

    /// What is not as a run must be.
    pub fn broken(&self, planted: bool, strict: bool) -> Vec<String> {
        let differ = self.differences.keys().map(|(rpc, path)| format!("{rpc} differs in {path}"));
        let mut broken: Vec<String> = differ.collect();
        if planted {
            let unseen = PLANTED.iter().filter(|(name, _)| !self.planted.contains(name));
            broken.extend(unseen.map(|(name, _)| format!("a planted fault was not found: {name}")));
        }
        if strict {
            let mut by_rpc = BTreeMap::<&str, (u64, u64)>::new();
            for ((rpc, _), (sent, succeeded)) in &self.calls {
                let all = by_rpc.entry(rpc).or_default();
                *all = (all.0 + sent, all.1 + succeeded);
            }
            let (percent, occur) = match self.has_users {
                true => (SUCCEED_PERCENT_OF_USERS, OCCUR_AMONG_USERS),
                false => (SUCCEED_PERCENT, OCCUR),
            };
            let poor = by_rpc
                .iter()
                .filter(|(rpc, (sent, ok))| *sent >= OFTEN && ok * 100 < sent * percent && !REFUSED_ONLY.contains(rpc));
            broken.extend(poor.map(|(rpc, (sent, ok))| format!("{rpc}: only {ok} of {sent} succeeded")));
            let occurred = |text: &str| self.errors.contains_key(&format!("etcdserver: {text}"));
            let missing = occur.iter().filter(|text| !occurred(text));
            broken.extend(missing.map(|text| format!("never given: etcdserver: {text}")));
            let known = |text: &str| {
                OCCUR.contains(&text) || occur.contains(&text) || ELSEWHERE.iter().any(|(known, _)| *known == text)
            };
            let new =
                self.errors.keys().filter_map(|text| text.strip_prefix("etcdserver: ")).filter(|text| !known(text));
            broken.extend(new.map(|text| format!("in no list: etcdserver: {text}")));
            broken.extend(self.uses.unused(self.has_users).into_iter().map(|entry| format!("never needed: {entry}")));
        }
        broken
    }
}

/// The error that etcd gave.
fn error(answers: &Answers) -> Option<String> {
    let theirs = &answers.theirs;
    if let Some(error) = theirs.get("error") {
        return Some(error["text"].as_str().unwrap_or("waits").to_owned());
    }
    if theirs.get("waits").is_some() {
        return Some("waits".to_owned());
    }
    let code = theirs.get("http")?.as_u64()?;
    let text = || theirs["body"][0]["message"].as_str().map_or_else(|| format!("HTTP {code}"), str::to_owned);
    (code != 200).then(text)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: u64 = self.calls.values().map(|(sent, _)| sent).sum();
        for ((rpc, door), (sent, succeeded)) in &self.calls {
            writeln!(f, "{rpc} {door}: {sent}, {succeeded} succeeded")?;
        }
        for (text, count) in &self.errors {
            writeln!(f, "{count} times: {text}")?;
        }
        for ((rpc, path), (count, first)) in &self.differences {
            writeln!(f, "DIFFERENT {count} times: {rpc} {path}\n{first}")?;
        }
        writeln!(f, "planted faults found: {} of {}", self.planted.len(), PLANTED.len())?;
        write!(f, "{total} requests")
    }
}

/// Prints a difference and how to see it again.
pub fn print_found(calls: &[Call], found: &Found, report: &mut Report) -> anyhow::Result<()> {
    let (mut file, path) = tempfile::Builder::new().prefix("differ-").suffix(".jsonl").tempfile()?.keep()?;
    for call in calls {
        writeln!(file, "{}", call.line())?;
    }
    println!("{report}\n\n{} requests, the last of them answered differently:", calls.len());
    if calls.len() <= 30 {
        calls.iter().for_each(|call| println!("{}", call.line()));
    }
    found.differences.iter().for_each(|difference| println!("{difference}"));
    println!("last request: {}", found.call.line());
    if let Some(answers) = &found.answers {
        println!("ours:   {}\netcd's: {}", answers.ours, answers.theirs);
    }
    println!("again: cargo run --release --example differ -- --replay {}", path.display());
    Ok(())
}
