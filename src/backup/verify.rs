//! Checks of a whole path: everything is read, made a state, and compared with what the members had.
//!
//! Each full backup is loaded, and the entries after it are applied as far as they lead; where that passes another full backup, both must
//! be the same state. So a moment that a finding does not name can be restored.

use super::archive::{Archive, NamedFull};
use super::restore::{Player, Until, is_same_digest};
use super::{Error, Result};
use crate::pb::backup::Generation;

/// What was checked.
#[derive(Debug, Default)]
pub struct Report {
    pub fulls: u64,
    pub records: u64,
    /// Objects that are damaged, or that do not fit.
    pub findings: Vec<Error>,
    /// The newest revision that can be restored; 0 for none.
    pub revision: i64,
}

/// Checks one generation; `progress` is told what is done.
pub async fn verify(archive: &Archive, generation: &Generation, progress: &mut dyn FnMut(String)) -> Result<Report> {
    let mut report =
        Report { records: archive.record_objects(generation.number).await?.len() as u64, ..Report::default() };
    let mut fulls: Vec<NamedFull> = Vec::new();
    for full in archive.fulls(generation.number).await? {
        full.map_or_else(|error| report.findings.push(error), |full| fulls.push(full));
    }
    fulls.sort_by_key(|full| full.applied().index);
    for (place, full) in fulls.iter().enumerate() {
        progress(format!("{}: revision {}", full.name, full.full.revision));
        match check(archive, full, fulls.get(place + 1)).await {
            Ok(revision) => report.revision = report.revision.max(revision),
            Err(error @ Error::Damaged { .. }) => report.findings.push(error),
            Err(error) => return Err(error),
        }
        report.fulls += 1;
    }
    Ok(report)
}

/// The revision that this full backup and the records after it lead to, up to the next one.
async fn check(archive: &Archive, full: &NamedFull, next: Option<&NamedFull>) -> Result<i64> {
    let mut player = Player::load(archive, full).await?;
    let until = next.map_or(Until::End, |next| Until::Index(next.applied().index));
    player.play(until).await?;
    let state = player.state();
    if let Some(next) = next
        && state.log_id.is_some_and(|log_id| log_id.index() == next.applied().index)
    {
        let hash = state.kv.hash_kv(0).map_err(|error| Error::Refused(error.to_string()))?;
        let is_same = hash.hash == next.full.hash_kv
            && hash.compact_revision == next.full.compacted
            && state.kv.revision() == next.full.revision
            && is_same_digest(next.full.digest.as_ref(), &state.kv);
        if !is_same {
            let reason = format!("it is another state than {} and the records after that lead to", full.name);
            return Err(archive.store().damaged(&next.name, reason));
        }
    }
    Ok(state.kv.revision())
}
