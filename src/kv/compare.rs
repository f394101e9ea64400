//! What comparisons ask of a key.
//!
//! Many comparisons of the same keys come to few bounds: a field lies between two values, and is none of some others. So what a
//! key costs does not grow with the comparisons that concern it, but with those alone that say what a field is not, and with these
//! by their logarithm. Of many keys the bounds of their own fields (`bounds`) mostly tell at once.
//! Invariant: [`Wanted::is_met`] says what [`compare`] says of each of the comparisons.
//! Absent: which keys a comparison is about (`txn`).

use std::cmp::Ordering;

use super::bounds::{Bounds, Field, ValueBounds};
use crate::pb::Fields;
use crate::pb::etcd::Compare;
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::key_value::compare_values;

/// A target without its operand is compared with zero or the empty value. What this build does not know never holds.
pub(super) fn compare(c: &Compare, kv: &Fields<'_>) -> bool {
    let Some(target) = Target::of(c) else { return false };
    let order = match target {
        Target::Number(field, operand) => field.of(kv).cmp(&operand),
        Target::Value(operand) => compare_values(kv.value, operand),
    };
    match CompareResult::try_from(c.result) {
        Ok(CompareResult::Equal) => order.is_eq(),
        Ok(CompareResult::Greater) => order.is_gt(),
        Ok(CompareResult::Less) => order.is_lt(),
        Ok(CompareResult::NotEqual) => order.is_ne(),
        Err(_) => false,
    }
}

enum Target<'a> {
    Number(Field, i64),
    Value(&'a [u8]),
}

impl<'a> Target<'a> {
    fn of(c: &'a Compare) -> Option<Self> {
        let operand = c.target_union.as_ref();
        Some(match CompareTarget::try_from(c.target).ok()? {
            CompareTarget::Version => Self::Number(
                Field::Version,
                operand.map_or(0, |x| if let TargetUnion::Version(v) = x { *v } else { 0 }),
            ),
            CompareTarget::Create => Self::Number(
                Field::Create,
                operand.map_or(0, |x| if let TargetUnion::CreateRevision(v) = x { *v } else { 0 }),
            ),
            CompareTarget::Mod => Self::Number(
                Field::Mod,
                operand.map_or(0, |x| if let TargetUnion::ModRevision(v) = x { *v } else { 0 }),
            ),
            CompareTarget::Lease => {
                Self::Number(Field::Lease, operand.map_or(0, |x| if let TargetUnion::Lease(v) = x { *v } else { 0 }))
            }
            CompareTarget::Value => {
                Self::Value(operand.map_or(&[][..], |x| if let TargetUnion::Value(v) = x { v } else { &[] }))
            }
        })
    }
}

/// A comparison among others.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    compare: &'a Compare,
    /// That of its operand in the order of theirs, if that is a value. Equal ones have the same. So whoever puts some of them in
    /// order, again and again, need not look at their bytes.
    place: usize,
}

impl<'a> Asked<'a> {
    pub(super) fn all(compares: impl Iterator<Item = &'a Compare>) -> Vec<Self> {
        let mut asked: Vec<Self> = compares.map(|compare| Self { compare, place: 0 }).collect();
        let operand = |asked: &Self| match Target::of(asked.compare) {
            Some(Target::Value(operand)) => Some(operand),
            Some(Target::Number(..)) | None => None,
        };
        let mut values: Vec<(&[u8], usize)> =
            asked.iter().enumerate().filter_map(|(i, asked)| Some((operand(asked)?, i))).collect();
        values.sort_unstable_by(|a, b| compare_values(a.0, b.0));
        for (place, equal) in values.chunk_by(|a, b| a.0 == b.0).enumerate() {
            equal.iter().for_each(|(_, i)| asked[*i].place = place);
        }
        asked
    }
}

/// What all of some comparisons ask of a key together.
pub(super) struct Wanted<'a> {
    numbers: [Option<Numbers>; Field::ALL.len()],
    value: Option<Values<'a>>,
}

/// Between two numbers, which count, and none of some others, ascending.
struct Numbers {
    least: i64,
    most: i64,
    not: Vec<i64>,
}

/// The same of values; those at the ends count if it is said.
#[derive(Default)]
struct Values<'a> {
    least: Option<(Operand<'a>, bool)>,
    most: Option<(Operand<'a>, bool)>,
    not: Vec<Operand<'a>>,
}

/// A value that keys' values are compared with.
#[derive(Clone, Copy)]
struct Operand<'a> {
    bytes: &'a [u8],
    /// As [`Asked::place`].
    place: usize,
}

impl Operand<'_> {
    /// It against a key's value.
    fn order(&self, value: &[u8]) -> Ordering {
        compare_values(self.bytes, value)
    }
}

impl<'a> Wanted<'a> {
    /// `None`: no key meets all of them.
    pub(super) fn of(asked: impl Iterator<Item = Asked<'a>>) -> Option<Self> {
        let mut wanted = Self { numbers: [const { None }; Field::ALL.len()], value: None };
        for Asked { compare: c, place } in asked {
            let result = CompareResult::try_from(c.result).ok()?;
            match Target::of(c)? {
                Target::Number(field, operand) => {
                    let all = || Numbers { least: i64::MIN, most: i64::MAX, not: Vec::new() };
                    wanted.numbers[field as usize].get_or_insert_with(all).narrow(result, operand)?;
                }
                Target::Value(bytes) => {
                    let operand = Operand { bytes, place };
                    wanted.value.get_or_insert_with(Values::default).narrow(result, operand);
                }
            }
        }
        for numbers in wanted.numbers.iter_mut().flatten() {
            numbers.not.sort_unstable();
        }
        if let Some(values) = &mut wanted.value {
            values.not.sort_unstable_by_key(|not| not.place);
        }
        Some(wanted)
    }

    pub(super) fn is_met(&self, kv: &Fields<'_>) -> bool {
        let met = |field: &Field| self.numbers[*field as usize].as_ref().is_none_or(|wanted| wanted.has(field.of(kv)));
        Field::ALL.iter().all(met) && self.value.as_ref().is_none_or(|wanted| wanted.has(kv.value))
    }

    /// Whether all of some keys meet them, if the bounds of these tell.
    pub(super) fn is_met_by_all<'b>(
        &self,
        numbers: impl Fn() -> &'b Bounds,
        values: impl Fn() -> &'b ValueBounds,
    ) -> Option<bool> {
        let mut is_told = true;
        for field in Field::ALL {
            let Some(wanted) = &self.numbers[field as usize] else { continue };
            match wanted.has_all(numbers().number(field)) {
                Some(true) => {}
                Some(false) => return Some(false),
                None => is_told = false,
            }
        }
        match self.value.as_ref().map(|wanted| wanted.has_all(values().values())) {
            Some(Some(false)) => Some(false),
            Some(None) => None,
            Some(Some(true)) | None => is_told.then_some(true),
        }
    }
}

impl Numbers {
    fn narrow(&mut self, result: CompareResult, operand: i64) -> Option<()> {
        match result {
            CompareResult::Equal => {
                self.least = self.least.max(operand);
                self.most = self.most.min(operand);
            }
            CompareResult::Greater => self.least = self.least.max(operand.checked_add(1)?),
            CompareResult::Less => self.most = self.most.min(operand.checked_sub(1)?),
            CompareResult::NotEqual => self.not.push(operand),
        }
        Some(())
    }

    fn has(&self, number: i64) -> bool {
        (self.least..=self.most).contains(&number) && self.not.binary_search(&number).is_err()
    }

    /// The same of all numbers of which these are the ends, if they tell.
    fn has_all(&self, (least, most): (i64, i64)) -> Option<bool> {
        if !self.has(least) || !self.has(most) {
            return Some(false);
        }
        let excluded = self.not.partition_point(|not| *not < least)..self.not.partition_point(|not| *not <= most);
        excluded.is_empty().then_some(true)
    }
}

impl<'a> Values<'a> {
    fn narrow(&mut self, result: CompareResult, operand: Operand<'a>) {
        // Of two ends the narrower, and of the same the one that does not count.
        let narrow = |end: &mut Option<(Operand<'a>, bool)>, counts: bool, narrower: Ordering| {
            let is_narrower = |(at, does): &(Operand<'a>, bool)| match operand.place.cmp(&at.place) {
                Ordering::Equal => !counts && *does,
                order => order == narrower,
            };
            if end.as_ref().is_none_or(is_narrower) {
                *end = Some((operand, counts));
            }
        };
        let up = |end: &mut _, counts| narrow(end, counts, Ordering::Greater);
        let down = |end: &mut _, counts| narrow(end, counts, Ordering::Less);
        match result {
            CompareResult::Equal => {
                up(&mut self.least, true);
                down(&mut self.most, true);
            }
            CompareResult::Greater => up(&mut self.least, false),
            CompareResult::Less => down(&mut self.most, false),
            CompareResult::NotEqual => self.not.push(operand),
        }
    }

    fn has(&self, value: &[u8]) -> bool {
        let is_within = |end: Option<(Operand<'_>, bool)>, beyond: Ordering| {
            end.is_none_or(|(end, counts)| match end.order(value) {
                Ordering::Equal => counts,
                order => order != beyond,
            })
        };
        is_within(self.least, Ordering::Greater)
            && is_within(self.most, Ordering::Less)
            && self.not.binary_search_by(|not| not.order(value)).is_err()
    }

    /// The same of all values of which these are the ends, if they tell.
    fn has_all(&self, (least, most): (&[u8], &[u8])) -> Option<bool> {
        if !self.has(least) || !self.has(most) {
            return Some(false);
        }
        let excluded = self.not.partition_point(|not| not.order(least).is_lt())
            ..self.not.partition_point(|not| not.order(most).is_le());
        excluded.is_empty().then_some(true)
    }
}

#[cfg(test)]
pub(super) mod tests;
