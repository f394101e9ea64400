//! README and docs/: short enough, whole, without dead links, and with commands that work.
//!
//! Owns the rules for pages. A block of `sh` is run as it stands, with all others of its page, in an empty directory and a network of its own,
//! so that the ports are those of the page; `<!-- test: ... -->` is what a reader has done before. In a block of `console` each line after `$` is
//! something for a cluster or a machine that a test has not: of these, what our own program and Helm are given must be something that they take.
//! Absent: the words.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser as _;

use crate::support::tools::{CURL, ETCDCTL, HELM, is_set, require, skip};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const README_WORDS_MAX: usize = 900;

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The pages that people read: README, SECURITY, the chart's README, and all of docs/.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    let mut found: Vec<PathBuf> =
        ["README.md", "SECURITY.md", "helm/quorate/README.md"].map(|name| root.join(name)).into();
    let mut open = vec![root.join("docs")];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|end| end == "md") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Links of a page, outside of code: what stands in `](...)`.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced || line.starts_with("    ") {
            continue;
        }
        // Code within a line holds no links.
        let words: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
        for (at, _) in words.match_indices("](") {
            let rest = &words[at + 2..];
            if let Some(end) = rest.find(')') {
                found.push(rest[..end].to_owned());
            }
        }
    }
    found
}

/// The names under which a page's headings can be linked to, as GitHub and mdBook make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        }
        let heading = line.trim_start_matches('#');
        if fenced || heading.len() == line.len() || !heading.starts_with(' ') {
            continue;
        }
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        found.insert(kept.map(|c| if c == ' ' { '-' } else { c }).collect());
    }
    found
}

#[test]
fn readme_is_short() {
    let words = read(&Path::new(ROOT).join("README.md")).split_whitespace().count();
    assert!(
        words <= README_WORDS_MAX,
        "README.md has {words} words, at most {README_WORDS_MAX}; move something to docs/"
    );
}

#[test]
fn every_link_leads_somewhere() {
    let mut dead = Vec::new();
    let mut seen = 0;
    for page in pages() {
        for link in links(&read(&page)) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            seen += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            let is_there = target.exists();
            let has_anchor = anchor.is_empty() || target.is_file() && anchors(&read(&target)).contains(anchor);
            if !is_there || !has_anchor {
                dead.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(seen > 40, "only {seen} links were found");
    assert_eq!(dead, Vec::<String>::new());
}

#[test]
fn the_book_has_every_page() {
    let docs = Path::new(ROOT).join("docs");
    let summary = read(&docs.join("SUMMARY.md"));
    let listed: BTreeSet<PathBuf> = links(&summary).iter().map(|link| docs.join(link)).collect();
    let pages = pages().into_iter().filter(|page| page.starts_with(&docs) && !page.ends_with("SUMMARY.md"));
    for page in pages {
        assert!(listed.contains(&page), "{} is not in docs/SUMMARY.md", page.display());
    }
    assert!(listed.iter().all(|page| page.exists()), "{listed:?}");
}

#[test]
fn links_and_anchors_are_found() {
    let text = "# A b's `c`\n[x](y.md#z) and `[no](n.md)`\n```\n# no\n[no](n.md)\n```\n## Two\n";
    assert_eq!(links(text), ["y.md#z"]);
    assert_eq!(anchors(text), BTreeSet::from(["a-bs-c".to_owned(), "two".to_owned()]));
}

/// Blocks of one kind, and what the tests do before them, in order.
fn blocks(text: &str, kind: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines() {
        let trimmed = line.trim_start();
        if let Some(block) = &mut open {
            if trimmed.starts_with("```") {
                found.push(open.take().unwrap());
            } else {
                *block += &format!("{line}\n");
            }
        } else if trimmed == format!("```{kind}") {
            open = Some(String::new());
        } else if let Some(before) = line.strip_prefix("<!-- test: ")
            && kind == "sh"
        {
            found.push(before.trim_end_matches("-->").trim().to_owned() + "\n");
        }
    }
    assert_eq!(open, None, "a block is not closed");
    found
}

/// A machine of its own for a page: an empty directory, and a network with nothing but the loopback interface.
fn run_page(page: &Path, script: &str) {
    let dir = tempfile::tempdir().unwrap();
    let bin = crate::support::cluster::binary();
    let path = format!("{}:{}", bin.parent().unwrap().display(), std::env::var("PATH").unwrap_or_default());
    let file = dir.path().join("page.sh");
    // What was started beside ends with the page.
    std::fs::write(
        &file,
        format!("set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait || true' EXIT\n{script}"),
    )
    .unwrap();
    let inside = "ip link set lo up && exec timeout 120 bash \"$0\"";
    let output = Command::new("unshare")
        .args(["--map-root-user", "--net", "--pid", "--fork", "--kill-child", "bash", "-c", inside])
        .arg(&file)
        .current_dir(dir.path())
        .env("PATH", path)
        .env_remove("QUORATE_ENDPOINTS")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned();
    let log = std::fs::read_to_string(dir.path().join("dev.log")).unwrap_or_default();
    assert!(output.status.success(), "{}: {}\n{script}\n{text}\n{log}", page.display(), output.status);
}

#[test]
fn commands_of_the_pages_work() {
    for tool in [&ETCDCTL, &CURL] {
        if require(tool).is_none() {
            return;
        }
    }
    let probe = Command::new("unshare").args(["--map-root-user", "--net", "ip", "link", "set", "lo", "up"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        return skip("no network of its own can be made here", is_set("QUORATE_REQUIRE_TOOLS"));
    }
    let mut ran = 0;
    for page in pages() {
        let blocks = blocks(&read(&page), "sh");
        if blocks.is_empty() {
            continue;
        }
        ran += blocks.len();
        run_page(&page, &blocks.concat());
    }
    assert!(ran > 8, "{ran} blocks");
}

/// The words of a command, as a shell would split them; `None` where it does more than that.
fn words(line: &str) -> Option<Vec<String>> {
    let output = Command::new("bash").args(["-c", &format!("set -f; printf '%s\\n' {line}")]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

#[test]
fn commands_for_clusters_are_ones_that_programs_take() {
    let Some(helm) = require(&HELM) else { return };
    let (mut ours, mut helms) = (0, 0);
    for page in pages() {
        let text = read(&page);
        let lines: Vec<String> = blocks(&text, "console").concat().lines().map(|line| line.trim().to_owned()).collect();
        for line in lines {
            let command = line.strip_prefix("$ ").unwrap_or_else(|| panic!("{}: {line}: no command", page.display()));
            for command in command.split([';', '&', '|']).map(str::trim).filter(|command| !command.is_empty()) {
                // Within a pod it is the same program.
                let command = command
                    .split_once(" -- quorate ")
                    .map_or(command.to_owned(), |(_, rest)| format!("quorate {rest}"));
                if command.starts_with("quorate ") {
                    let words = words(&command).unwrap_or_else(|| panic!("{command}"));
                    quorate::cli::Cli::try_parse_from(words)
                        .unwrap_or_else(|error| panic!("{}: {command}: {error}", page.display()));
                    ours += 1;
                } else if command.starts_with("helm install ") || command.starts_with("helm upgrade ") {
                    check_values(&helm, &command);
                    helms += 1;
                }
            }
        }
    }
    assert!(ours > 3 && helms > 3, "{ours} of ours, {helms} of Helm");
}

/// The values of `helm install` or `upgrade` are ones that the chart takes.
fn check_values(helm: &Path, command: &str) {
    let words = words(command).unwrap();
    let mut render = Command::new(helm);
    render.args(["template", "kv", "helm/quorate", "--kube-version", "1.30.0"]).current_dir(ROOT);
    for pair in words.windows(2).filter(|pair| pair[0] == "--set") {
        // Where Helm sees no cluster the chart makes no CA.
        render.args(["--set", &pair[1]]);
        if let Some(port) = pair[1].strip_prefix("tls.").and_then(|rest| rest.strip_suffix(".mode=auto")) {
            render.args(["--set", &format!("tls.{port}.secret=ca")]);
        }
    }
    let output = render.output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}
