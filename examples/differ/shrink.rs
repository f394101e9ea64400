//! Finds a short sequence of requests that still shows a difference.
//!
//! Parts are left out, half of it first and then ever smaller ones, and each attempt is played on new servers. That takes seconds each,
//! so there is a most number of attempts. Absent: shrinking within a request; with few of them a person sees what matters.

use std::path::Path;

use crate::call::Call;
use crate::report::Report;
use crate::{Found, play};

const ATTEMPTS_MAX: u32 = 80;

/// A shorter sequence that ends as `calls` does, in a difference of the same kind.
pub async fn shrink(etcd: &Path, mut calls: Vec<Call>, found: &Found) -> anyhow::Result<Vec<Call>> {
    let mut attempts = 0;
    let mut part = calls.len() / 2;
    while part > 0 && attempts < ATTEMPTS_MAX {
        // The last request shows the difference and stays; the oldest are left out first.
        let mut begin = 0;
        while begin + 1 < calls.len() && attempts < ATTEMPTS_MAX {
            let end = (begin + part).min(calls.len() - 1);
            let shorter = [&calls[..begin], &calls[end..]].concat();
            attempts += 1;
            let mut report = Report::new(false, false);
            let again = play(etcd, &shorter, &mut report).await?.filter(|again| again.kind() == found.kind());
            match again {
                // It may come sooner now.
                Some(_) => {
                    calls = shorter;
                    calls.truncate(report.last_index + 1);
                }
                None => begin = end,
            }
        }
        println!("shrinking: {} requests after {attempts} attempts", calls.len());
        part = part.min(calls.len()) / 2;
    }
    Ok(calls)
}
