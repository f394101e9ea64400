//! Removes what is not kept, in an order in which a crash leaves nothing that counts without what it needs.

use std::collections::HashMap;
use std::time::Duration;

use super::Result;
use super::archive::{Archive, DATA};
use super::plan::{Aged, Retention, expired};

/// Data that does not count is of a full backup that is being made, or of one that never came to an end; after so long, of the latter.
const UNFINISHED_MAX: Duration = Duration::from_secs(24 * 3600);

/// What was removed, or would be.
#[derive(Debug, Default, PartialEq)]
pub struct Pruned {
    pub fulls: Vec<String>,
    pub records: u64,
    /// Data of full backups that never came to an end.
    pub unfinished: Vec<String>,
}

/// Removes what `keep` does not keep; with `dry_run` it only says what.
pub async fn prune(archive: &Archive, keep: &Retention, dry_run: bool) -> Result<Pruned> {
    let (mut fulls, mut objects) = (Vec::new(), Vec::new());
    for generation in archive.generations().await? {
        let found = archive.full_objects(generation.number).await?;
        let modified: HashMap<&str, _> = found.iter().map(|found| (&found.name[..], found.modified)).collect();
        for full in archive.fulls(generation.number).await? {
            // One that is damaged is for a person to look at.
            let Ok(named) = full else { continue };
            let Some(modified) = modified.get(&named.name[..]).copied() else { continue };
            fulls.push(Aged { named, modified });
        }
        objects.push((generation.number, found));
    }
    let gone = expired(&fulls, keep);
    let mut pruned = Pruned { fulls: gone.fulls.clone(), ..Pruned::default() };
    if !dry_run {
        for name in &gone.fulls {
            archive.remove(name).await?;
            archive.remove(&format!("{name}{DATA}")).await?;
        }
    }
    for (generation, upto) in &gone.records_before {
        for (number, found) in archive.record_objects(*generation).await? {
            if number >= *upto {
                break;
            }
            pruned.records += 1;
            if !dry_run {
                archive.remove(&found.name).await?;
            }
        }
    }
    let all = || objects.iter().flat_map(|(_, found)| found);
    let now = all().map(|found| found.modified).max();
    for found in all().filter(|found| found.name.ends_with(DATA)) {
        let name = found.name.trim_end_matches(DATA);
        let age = now.and_then(|now| now.duration_since(found.modified).ok()).unwrap_or_default();
        if age >= UNFINISHED_MAX && !all().any(|other| other.name == name) {
            pruned.unfinished.push(found.name.clone());
            if !dry_run {
                archive.remove(&found.name).await?;
            }
        }
    }
    Ok(pruned)
}
