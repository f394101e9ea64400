//! The house rules that a machine can check: which module may import which, where a crate or a part of the outside world may
//! be named, that files of one directory do not import one another in a circle, and how large files and functions grow.
//!
//! Invariant: every rule has a fixture below that breaks it, so that a check that finds nothing is known to look.
//! Absent: formatting (rustfmt) and idioms (clippy).

mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use source::{Token, UsedPath};

/// Modules by height: a module imports only what stands on a lower line.
const LAYERS: &[&[&str]] = &[
    &["pb", "error", "env", "metrics"],
    &["config", "identity", "telemetry", "caller"],
    &["secure"],
    &["storage"],
    &["kv"],
    &["raft"],
    &["node"],
    &["watch", "lease"],
    &["cluster"],
    &["backup"],
    &["conditions"],
    &["api", "http"],
    &["server"],
    &["cli"],
    &["fuzzing", "testing"],
];

/// Imports within one line of [`LAYERS`]: importer, imported.
const SIBLINGS: &[(&str, &str)] = &[("pb", "env"), ("config", "identity"), ("telemetry", "config"), ("http", "api")];

/// Where a crate, or a path below one, may be named: path prefix, homes. A home ending in `*` is any path that begins so; another
/// is the module of that name.
const HOMES: &[(&str, &[&str])] = &[
    ("sled", &["src/storage/state"]),
    ("openraft", &["src/raft", "src/node*"]),
    ("tonic", GRPC),
    ("tonic_health", GRPC),
    ("tonic_prost", GRPC),
    ("tonic_reflection", GRPC),
    ("kube", &["src/cluster/kubernetes"]),
    ("object_store", &["src/backup"]),
    ("tokio_rustls", &["src/secure"]),
    ("hickory_resolver", &["src/env/srv"]),
    ("rustls_native_certs", &["src/secure"]),
    ("rcgen", &["src/secure"]),
    ("x509_parser", &["src/secure"]),
    ("k8s_openapi", &["src/cluster/kubernetes"]),
    ("std::fs", WORLD),
    ("tokio::fs", WORLD),
    ("std::time::Instant", WORLD),
    ("std::time::SystemTime", WORLD),
    ("tokio::time", WORLD),
    ("tokio::spawn", WORLD),
    ("tokio::task::spawn", WORLD),
    ("tokio::task::spawn_blocking", WORLD),
    ("tokio::task::spawn_local", WORLD),
    ("tokio::task::block_in_place", WORLD),
    ("std::thread::spawn", WORLD),
    ("std::thread::sleep", WORLD),
    ("std::thread::Builder", WORLD),
    ("bcrypt", &["src/secure"]),
    ("clap_mangen", &["src/cli"]),
    ("ring::hmac", &["src/secure"]),
    ("ring::rand", &["src/env"]),
    ("rand", &["src/env"]),
    ("fastrand", &["src/env"]),
    // Nothing that came over a port is a member's own work.
    ("crate::caller::Caller::Internal", &["src/caller", "src/node*", "src/lease", "src/cluster", "src/backup"]),
    // A queue without a bound is memory without a bound: no home at all.
    ("std::sync::mpsc::channel", &[]),
    ("tokio::sync::mpsc::unbounded_channel", &[]),
];
const GRPC: &[&str] = &["src/api", "src/raft", "src/pb", "src/error", "src/server", "src/cli", "src/testing"];
/// `cli/dev` runs processes and makes their directories, and `testing` the simulated world; they are no part of a member.
const WORLD: &[&str] = &["src/env", "src/cli/dev*", "src/testing"];

/// Who serves clients; and among them the service of the members.
const GATED: &[&str] = &["src/api", "src/http"];
const NOT_GATED: &[&str] = &["src/api/peer"];

const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 80;
/// The part of `docs/reliability.md` in which each line names tests.
const REGRESSIONS: &str = "What has failed elsewhere";
const UNFINISHED: [&str; 3] = ["todo", "unimplemented", "dbg"];

#[test]
fn the_project_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut findings = Vec::new();
    let mut sources = 0;
    let mut shipped = Vec::new();
    for file in files(root) {
        let path = file.strip_prefix(root).expect("files are below the root").to_str().expect("names are UTF-8");
        // What is not text has nothing to check.
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        findings.extend(check_text(path, &text));
        if path.ends_with(".rs") {
            sources += 1;
            findings.extend(check_source(path, &text));
            if is_shipped(path) {
                shipped.push((path.to_owned(), text));
            }
        }
    }
    findings.extend(circles(&shipped));
    assert!(sources > 10, "only {sources} source files were found below {}", root.display());
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

/// Rules for every file.
fn check_text(path: &str, text: &str) -> Vec<String> {
    // Put together here, so that this file does not break the rule itself.
    let outside = concat!("../", "shared");
    let lines = text.lines().enumerate().filter(|(_, line)| line.contains(outside));
    lines.map(|(i, _)| format!("{path}:{}: names {outside}; the project must stand on its own", i + 1)).collect()
}

/// Rules for Rust files.
fn check_source(path: &str, text: &str) -> Vec<String> {
    let all = source::tokens(text);
    let mut findings = Vec::new();
    if !text.starts_with("//!") && path != "build.rs" {
        findings.push(format!("{path}:1: opens without a `//!` that says what it owns"));
    }
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        findings.push(format!("{path}:1: {lines} lines, at most {FILE_LINES_MAX}"));
    }
    for (name, line, length) in source::functions(&all) {
        if length > FUNCTION_LINES_MAX {
            findings.push(format!("{path}:{line}: `{name}` has {length} lines, at most {FUNCTION_LINES_MAX}"));
        }
    }
    for pair in all.windows(2) {
        if UNFINISHED.contains(&pair[0].text) && pair[1].text == "!" {
            findings.push(format!("{path}:{}: `{}!` is left in", pair[0].line, pair[0].text));
        }
    }
    if is_shipped(path) {
        findings.extend(check_imports(path, &source::without_tests(&all)));
    }
    findings
}

fn is_shipped(path: &str) -> bool {
    path.starts_with("src/") && !path.ends_with("/tests.rs") && !path.contains("/tests/")
}

/// Files (or directories) of one directory that import one another, directly or by way of others. What a `mod.rs` passes on under its own
/// name belongs to the directory, so importing that counts for no file.
fn circles(sources: &[(String, String)]) -> Vec<String> {
    let by_name = |path: &[&str]| path.join("/");
    let modules: BTreeMap<String, Vec<&str>> =
        sources.iter().map(|(path, _)| module_path(path)).map(|module| (by_name(&module), module)).collect();
    // A directory and a name in it, and the names beside it from which that one imports.
    let mut imports: BTreeMap<(&[&str], &str), BTreeSet<&str>> = BTreeMap::new();
    for (path, text) in sources {
        let here = &modules[&by_name(&module_path(path))];
        for used in source::paths(&source::without_tests(&source::tokens(text))) {
            let path = absolute(here, &used);
            let there = (1..=path.len()).rev().find_map(|length| modules.get(&by_name(&path[..length])));
            let Some(there) = there else { continue };
            let shared = here.iter().zip(there).take_while(|(one, other)| one == other).count();
            // Between the crate's own modules `LAYERS` says more.
            if let (1.., Some(importer), Some(imported)) = (shared, here.get(shared), there.get(shared)) {
                imports.entry((&here[..shared], importer)).or_default().insert(imported);
            }
        }
    }
    let leads = |directory: &[&str], from: &str, to: &str| {
        let (mut open, mut seen) = (vec![from], BTreeSet::new());
        while let Some(at) = open.pop() {
            let next = imports.iter().filter(|((of, importer), _)| *of == directory && *importer == at);
            open.extend(next.flat_map(|(_, imported)| imported).filter(|one| seen.insert(**one)));
        }
        seen.contains(to)
    };
    let mut found = Vec::new();
    for ((directory, importer), imported) in &imports {
        let back = imported.iter().filter(|other| leads(directory, other, importer));
        let place = by_name(directory);
        found.extend(back.map(|other| format!("src/{place}: `{importer}` imports `{other}`, which leads back to it")));
    }
    found
}

/// Rules for what is shipped: direction of imports, homes, and the gate.
fn check_imports(path: &str, tokens: &[Token]) -> Vec<String> {
    let mut findings = Vec::new();
    // Whoever serves clients reads the state through functions that are told for whom (`node::gate`).
    if GATED.iter().any(|home| is_in(path, home)) && !NOT_GATED.iter().any(|home| is_in(path, home)) {
        let calls = tokens.windows(4).filter(|t| t.iter().map(|t| t.text).eq([".", "store", "(", ")"]));
        findings.extend(calls.map(|t| format!("{path}:{}: the state is read past the gate, by `store()`", t[1].line)));
    }
    let here = module_path(path);
    for used in source::paths(tokens) {
        for (what, homes) in HOMES {
            if used.starts_with(what) && !homes.iter().any(|home| is_in(path, home)) {
                findings.push(format!("{path}:{}: `{what}` may be named only in {homes:?}", used.line));
            }
        }
        let (Some(importer), Some(imported)) = (here.first(), from_root(&here, &used)) else { continue };
        if let Err(reason) = may_import(importer, imported) {
            findings.push(format!("{path}:{}: {reason}", used.line));
        }
    }
    // One import may name the same thing more than once.
    findings.dedup();
    findings
}

fn may_import(importer: &str, imported: &str) -> Result<(), String> {
    let height = |module: &str| {
        let found = LAYERS.iter().position(|layer| layer.contains(&module));
        found.ok_or_else(|| format!("module `{module}` has no layer; give it one in tests/it/tidy.rs"))
    };
    let (above, below) = (height(importer)?, height(imported)?);
    if importer == imported || below < above || SIBLINGS.contains(&(importer, imported)) {
        return Ok(());
    }
    Err(format!("`{importer}` may not import `{imported}`, which stands no lower"))
}

/// The module of the crate's root that a path leads into, if it leads there.
fn from_root<'a>(here: &[&str], used: &'a UsedPath) -> Option<&'a str> {
    let climbs = used.segments.iter().take_while(|segment| *segment == "super").count();
    let at = match used.segments[0].as_str() {
        "crate" => 1,
        _ if climbs > 0 && climbs == here.len() => climbs,
        _ => return None,
    };
    used.segments.get(at).map(String::as_str)
}

/// A path within the crate, from its root on; empty for any other.
fn absolute<'a>(here: &[&'a str], used: &'a UsedPath) -> Vec<&'a str> {
    let climbs = used.segments.iter().take_while(|segment| *segment == "super").count();
    let (base, rest) = match used.segments[0].as_str() {
        "crate" => (&here[..0], &used.segments[1..]),
        _ if climbs > 0 && climbs <= here.len() => (&here[..here.len() - climbs], &used.segments[climbs..]),
        _ => return Vec::new(),
    };
    base.iter().copied().chain(rest.iter().map(String::as_str)).collect()
}

/// `src/a/b.rs` and `src/a/b/mod.rs` are `[a, b]`; the crate's root files are `[]`, and above all layers.
fn module_path(path: &str) -> Vec<&str> {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs");
    let inner = inner.strip_suffix("/mod").unwrap_or(inner);
    if matches!(inner, "lib" | "main") { Vec::new() } else { inner.split('/').collect() }
}

fn is_in(path: &str, home: &str) -> bool {
    match home.strip_suffix('*') {
        Some(start) => path.starts_with(start),
        None => path.strip_prefix(home).is_some_and(|rest| rest == ".rs" || rest.starts_with('/')),
    }
}

/// The project's files, without what is built or git's own.
fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("the directory can be read") {
        let entry = entry.expect("the entry can be read");
        let kind = entry.file_type().expect("the entry has a type");
        if kind.is_dir() && !matches!(entry.file_name().to_str(), Some(".git" | "target")) {
            found.extend(files(&entry.path()));
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// A path, a source that breaks one rule there, and what the finding must say.
const BROKEN: &[(&str, &str, &str)] = &[
    ("src/kv/store.rs", "//! x\nuse crate::raft::Log;", "src/kv/store.rs:2: `kv` may not import `raft`"),
    ("src/kv/store.rs", "//! x\nuse crate::{pb, api::{self, v3}};", "`kv` may not import `api`"),
    ("src/kv/store.rs", "//! x\nfn f() { crate::server::run() }", "`kv` may not import `server`"),
    ("src/kv/store.rs", "//! x\nuse super::super::node;", "`kv` may not import `node`"),
    ("src/error.rs", "//! x\nuse super::env::Env;", "`error` may not import `env`"),
    ("src/cluster/mod.rs", "//! x\nuse crate::api::Kv;", "`cluster` may not import `api`"),
    ("src/magic.rs", "//! x\nuse crate::pb;", "module `magic` has no layer"),
    ("src/kv/mod.rs", "//! x\nuse sled::Tree;", "`sled` may be named only in"),
    ("src/storage/log.rs", "//! x\nfn f() { ::sled::open(\"x\"); }", "`sled` may be named only in"),
    ("src/api/kv.rs", "//! x\nuse openraft as r;", "`openraft` may be named only in"),
    ("src/kv/mod.rs", "//! x\nuse tonic::Status;", "`tonic` may be named only in"),
    ("src/cluster/plan.rs", "//! x\nuse kube::Client;", "`kube` may be named only in"),
    ("src/server/mod.rs", "//! x\nuse tokio_rustls::TlsAcceptor;", "`tokio_rustls` may be named only in"),
    ("src/storage/log.rs", "//! x\nfn f() { std::fs::read(\"x\"); }", "`std::fs` may be named only in"),
    ("src/storage/log.rs", "//! x\nuse std::{fs, io};", "`std::fs` may be named only in"),
    ("src/storage/log.rs", "//! x\nuse std as s;\nfn f() { s::fs::read(\"x\"); }", "log.rs:3: `std::fs` may be named"),
    ("src/node.rs", "//! x\nuse std::time::{Duration, Instant};", "`std::time::Instant` may be named only in"),
    ("src/node.rs", "//! x\nuse std::time;\nfn f() { time::Instant::now(); }", "node.rs:3: `std::time::Instant`"),
    ("src/node.rs", "//! x\nfn f() { tokio::spawn(async {}); }", "`tokio::spawn` may be named only in"),
    ("src/node.rs", "//! x\nuse std::thread;\nfn f() { thread::spawn(|| ()); }", "`std::thread::spawn` may be named"),
    ("src/cli/dev.rs", "//! x\nfn f() { fastrand::u8(..); }", "`fastrand` may be named only in"),
    ("src/node.rs", "//! x\nuse rand::Rng;", "`rand` may be named only in"),
    ("src/node.rs", "//! x\nuse tokio::sync::mpsc;\nfn f() { mpsc::unbounded_channel(); }", "unbounded_channel"),
    ("src/api/kv.rs", "//! x\nfn f() { node.store().view(); }", "src/api/kv.rs:2: the state is read past the gate"),
    (
        "src/api/kv.rs",
        "//! x\nuse crate::caller::Caller;\nfn f() { Caller::Internal; }",
        "`crate::caller::Caller::Internal` may",
    ),
    ("src/node.rs", "use crate::pb;", "opens without a `//!`"),
    ("tests/it/x.rs", "//! x\nfn f() { todo!() }", "tests/it/x.rs:2: `todo!` is left in"),
    ("src/node.rs", "//! x\n#[cfg(test)]\nmod tests { fn f() { dbg!(1) } }", "`dbg!` is left in"),
];

/// Sources in which nothing is wrong, though it looks so.
const SOUND: &[(&str, &str)] = &[
    ("src/kv/store.rs", "//! std::fs, crate::raft\nuse super::plan;\nuse crate::pb;\n/* sled::open todo!() */"),
    (
        "src/kv/store.rs",
        "//! x\nconst A: &str = r#\"use crate::api; \"todo!()\"#; const B: char = '\"'; fn f<'a>(x: &'a u8) {}",
    ),
    ("src/storage/state/mod.rs", "//! x\nuse sled::Tree;"),
    ("src/api/peer.rs", "//! x\nfn f() { node.store(); }"),
    ("src/node/gate.rs", "//! x\nuse crate::caller::Caller;\nfn f() { node.store(); Caller::Internal; }"),
    ("src/node_loop.rs", "//! x"),
    ("src/node.rs", "//! x\nuse crate::env::Instant;\nfn f() { Instant::now(); }"),
    ("src/node.rs", "//! x\nuse std::time::Duration;\n#[cfg(test)]\nmod tests {\n fn f() { std::fs::read(\"x\"); }\n}"),
    ("src/cli/dev.rs", "//! x\nuse std::fs;"),
    ("src/telemetry.rs", "//! x\nuse crate::config::Log;"),
    ("src/main.rs", "//! x\nuse quorate::cli;"),
];

#[test]
fn every_rule_finds_what_breaks_it() {
    for (path, source, want) in BROKEN {
        let findings = check_source(path, source);
        assert_eq!(findings.len(), 1, "{path} {source:?}: {findings:?}");
        assert!(findings[0].contains(want), "{source:?}: {findings:?} does not say {want:?}");
    }
    for (path, source) in SOUND {
        assert_eq!(check_source(path, source), Vec::<String>::new(), "{source:?}");
    }
    let beside = |parts: &[(&str, &str)]| {
        let sources =
            parts.iter().map(|(path, source)| ((*path).to_owned(), format!("//! x\n{source}"))).collect::<Vec<_>>();
        circles(&sources)
    };
    let two = [("src/kv/a.rs", "use super::b::B;"), ("src/kv/b.rs", "fn f() { crate::kv::a::g() }")];
    let found = ["src/kv: `a` imports `b`, which leads back to it", "src/kv: `b` imports `a`, which leads back to it"];
    assert_eq!(beside(&two), found);
    let three = [
        two[0],
        ("src/kv/b/mod.rs", "mod c;"),
        ("src/kv/b/c.rs", "use super::super::d::D;"),
        ("src/kv/d.rs", "use super::{a, State};"),
    ];
    assert_eq!(beside(&three).len(), 3, "the way round is longer");
    assert_eq!(
        beside(&[two[0], ("src/kv/b.rs", "use super::State;"), ("src/kv/mod.rs", "pub use a::State;")]).len(),
        0
    );
    assert_eq!(check_text("README.md", &format!("a\nsee {}/x", concat!("../", "shared"))).len(), 1);
}

/// The cases of the membership that somebody has thought of, each with a test that names it. 38 (certificates that rotate
/// under load) has none yet.
#[test]
fn every_membership_case_has_a_test() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    let mut named = BTreeSet::new();
    for file in files(&tests).iter().filter(|file| file.extension().is_some_and(|end| end == "rs")) {
        let text = std::fs::read_to_string(file).expect("a source can be read");
        for line in text.lines().filter_map(|line| line.trim().strip_prefix("/// Case")) {
            let head = line.split([':', ',']).next().unwrap_or_default();
            named.extend(head.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse::<u32>().ok()));
        }
    }
    let missing: Vec<u32> = (1..=40).filter(|case| *case != 38 && !named.contains(case)).collect();
    assert!(missing.is_empty(), "no test names the cases {missing:?}");
}

/// Tests that `text` names under `heading`, in backticks, and that are no function in `sources`.
fn missing_tests(text: &str, heading: &str, sources: &str) -> Vec<String> {
    let section = text.split("\n## ").find_map(|section| section.strip_prefix(heading)).expect("the section is there");
    let quoted = section.split('`').skip(1).step_by(2);
    let names = quoted.filter(|word| word.contains('_') && word.chars().all(|c| c.is_alphanumeric() || c == '_'));
    names.filter(|name| !sources.contains(&format!("fn {name}("))).map(str::to_owned).collect()
}

#[test]
fn tests_that_the_documentation_names_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rust = files(root).into_iter().filter(|file| file.extension().is_some_and(|end| end == "rs"));
    let sources: String = rust.map(|file| std::fs::read_to_string(file).expect("a source can be read")).collect();
    let text = std::fs::read_to_string(root.join("docs/reliability.md")).expect("the document is there");
    assert_eq!(missing_tests(&text, REGRESSIONS, &sources), Vec::<String>::new());
    let fixture = format!("# A\n\n## {REGRESSIONS}\n| x | `is_there`, `is_gone` |\n\n## B\n`is_not_asked_for`\n");
    assert_eq!(missing_tests(&fixture, REGRESSIONS, "fn is_there() {}"), ["is_gone"]);
}

/// A planted fault that is nowhere in the source would count as caught by nobody's fault; and what is shipped has the word `false`.
#[test]
fn planted_faults_are_in_the_source_and_not_in_what_is_shipped() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources: Vec<(std::path::PathBuf, String)> = files(&root.join("src"))
        .into_iter()
        .filter_map(|file| Some((file.clone(), std::fs::read_to_string(file).ok()?)))
        .collect();
    for (name, _) in quorate::env::planted::PLANTED {
        let used = sources.iter().any(|(_, text)| text.contains(&format!("planted!(\"{name}\")")));
        assert!(used, "{name} is planted nowhere");
    }
    let (_, planted) = sources.iter().find(|(file, _)| file.ends_with("env/planted.rs")).expect("it is there");
    let shipped = planted.split("#[cfg(not(any(test, feature = \"testing\")))]").nth(1).expect("what is shipped");
    assert!(shipped.starts_with("\nmacro_rules! planted {\n    ($name:literal) => {\n        false\n"), "{shipped}");
}

#[test]
fn size_limits_are_exact() {
    let function = |body: usize| format!("//! x\nfn long() {{\n{}}}\n", "    a();\n".repeat(body));
    assert!(check_source("src/kv/x.rs", &function(FUNCTION_LINES_MAX - 2)).is_empty());
    let findings = check_source("src/kv/x.rs", &function(FUNCTION_LINES_MAX - 1));
    assert_eq!(findings, ["src/kv/x.rs:2: `long` has 81 lines, at most 80"]);

    let file = |lines: usize| format!("//! x\n{}", "\n".repeat(lines - 1));
    assert!(check_source("src/kv/x.rs", &file(FILE_LINES_MAX)).is_empty());
    assert_eq!(check_source("src/kv/x.rs", &file(FILE_LINES_MAX + 1)).len(), 1);
}
