//! A checker of what a watcher was sent, against the one history of the store.
//!
//! etcd's promises: *ordered* by revision, *unique*, *reliable* (nothing missing up to the last revision sent), *atomic* (a
//! revision is sent whole), *resumable* (a watch from any uncompacted revision gets what followed it), *bookmarkable* (a progress
//! notice of revision r means that everything up to r was sent).
//! Absent: timing; that everything comes in the end is the caller's to wait for, and then to say with `complete_to`.

use std::collections::HashSet;

use super::history::{Event, Span};
use super::model::Store;

/// What came on one watch, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// One response; with `fragment` more of the same revision follows in the next.
    Events { events: Vec<Event>, fragment: bool },
    /// Everything up to this revision was sent.
    Progress(i64),
}

/// One watch, from its creation to its end. A resumed one is another that begins where this one ended.
#[derive(Clone, Debug)]
pub struct Watched {
    pub span: Span,
    /// The first revision asked for.
    pub start: i64,
    pub puts: bool,
    pub deletes: bool,
    pub messages: Vec<Message>,
    /// Everything up to this revision must have come: what was waited for.
    pub complete_to: Option<i64>,
}

/// Which promise was broken, and how.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("order: revision {later} came before {earlier}")]
    Order { later: i64, earlier: i64 },
    #[error("unique: {event:?} came twice")]
    Twice { event: Event },
    #[error("from the future or from nowhere: {event:?} is not in the history")]
    Invented { event: Event },
    #[error("complete: {event:?} was not sent, though revision {sent} was")]
    Missing { event: Event, sent: i64 },
    #[error("atomic: revision {revision} came in more than one response")]
    Torn { revision: i64 },
    #[error("bookmark: revision {told} was told, and {event:?} came after it")]
    Bookmark { told: i64, event: Event },
    #[error("start: {event:?} is older than the revision asked for, {start}")]
    TooOld { event: Event, start: i64 },
}

/// Checks one watch against the stores of each revision (element 0 is revision 1, as `model::replay` gives them).
pub fn check(watched: &Watched, stores: &[Store]) -> Result<(), Broken> {
    let mut sent: Vec<Event> = Vec::new();
    let mut unique = HashSet::new();
    let mut told = 0;
    let mut open = None;
    for message in &watched.messages {
        match message {
            Message::Progress(revision) => told = told.max(*revision),
            Message::Events { events, fragment } => {
                check_message(watched, events, &sent, &unique, told, open)?;
                unique.extend(events.iter().cloned());
                sent.extend(events.iter().cloned());
                open = events.last().map(Event::revision).filter(|_| *fragment);
            }
        }
    }
    let newest = sent.last().map_or(0, Event::revision).max(told).max(watched.complete_to.unwrap_or(0));
    let mut sent = sent.into_iter().peekable();
    let first = usize::try_from(watched.start - 2).unwrap_or(0);
    for pair in stores.windows(2).skip(first).take_while(|pair| pair[1].revision <= newest) {
        let revision = pair[1].revision;
        let mut due: Vec<Event> =
            pair[1].events_since(&pair[0]).into_iter().filter(|event| watched.wants(event)).collect();
        while let Some(event) = sent.next_if(|event| event.revision() == revision) {
            match due.iter().position(|due| *due == event) {
                Some(at) => drop(due.remove(at)),
                None => return Err(Broken::Invented { event }),
            }
        }
        if let Some(event) = due.into_iter().next() {
            return Err(Broken::Missing { event, sent: newest });
        }
    }
    sent.next().map_or(Ok(()), |event| Err(Broken::Invented { event }))
}

fn check_message(
    watched: &Watched,
    events: &[Event],
    sent: &[Event],
    unique: &HashSet<Event>,
    told: i64,
    open: Option<i64>,
) -> Result<(), Broken> {
    let mut last = sent.last().map_or(0, Event::revision);
    if let Some(first) = events.first()
        && first.revision() == last
        && open != Some(last)
        && !unique.contains(first)
    {
        return Err(Broken::Torn { revision: last });
    }
    for (at, event) in events.iter().enumerate() {
        if unique.contains(event) || events[..at].contains(event) {
            return Err(Broken::Twice { event: event.clone() });
        }
        if event.revision() < last {
            return Err(Broken::Order { later: last, earlier: event.revision() });
        }
        if event.revision() <= told {
            return Err(Broken::Bookmark { told, event: event.clone() });
        }
        if event.revision() < watched.start {
            return Err(Broken::TooOld { event: event.clone(), start: watched.start });
        }
        last = event.revision();
    }
    Ok(())
}

impl Watched {
    /// Every event that came.
    pub fn events(&self) -> impl Iterator<Item = &Event> {
        self.messages.iter().flat_map(|message| match message {
            Message::Events { events, .. } => events.as_slice(),
            Message::Progress(_) => &[],
        })
    }

    fn wants(&self, event: &Event) -> bool {
        let kind = if matches!(event, Event::Put(_)) { self.puts } else { self.deletes };
        kind && self.span.holds(event.key())
    }
}
