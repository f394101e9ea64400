//! What comparisons ask of a key.
//!
//! Many comparisons of the same keys come to few bounds: a field lies between two values, and is none of some others. So what a
//! key costs does not grow with the comparisons that concern it, but with those alone that say what a field is not, and with these
//! by their logarithm. Of many keys the bounds of their own fields (`bounds`) mostly tell at once.
//! Invariant: [`Wanted::is_met`] says what [`compare`] says of each of the comparisons.
//! Absent: which keys a comparison is about (`txn`).

use super::bounds::{Bounds, Field, ValueBounds};
use crate::pb::Fields;
use crate::pb::etcd::Compare;
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};

/// A target without its operand is compared with zero or the empty value. What this build does not know never holds.
pub(super) fn compare(c: &Compare, kv: &Fields<'_>) -> bool {
    let Some(target) = Target::of(c) else { return false };
    let order = match target {
        Target::Number(field, operand) => field.of(kv).cmp(&operand),
        Target::Value(operand) => kv.value.cmp(operand),
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
    least: Option<(&'a [u8], bool)>,
    most: Option<(&'a [u8], bool)>,
    not: Vec<&'a [u8]>,
}

impl<'a> Wanted<'a> {
    /// `None`: no key meets all of them.
    pub(super) fn of(compares: impl Iterator<Item = &'a Compare>) -> Option<Self> {
        let mut wanted = Self { numbers: [const { None }; Field::ALL.len()], value: None };
        for c in compares {
            let result = CompareResult::try_from(c.result).ok()?;
            match Target::of(c)? {
                Target::Number(field, operand) => {
                    let all = || Numbers { least: i64::MIN, most: i64::MAX, not: Vec::new() };
                    wanted.numbers[field as usize].get_or_insert_with(all).narrow(result, operand)?;
                }
                Target::Value(operand) => wanted.value.get_or_insert_with(Values::default).narrow(result, operand),
            }
        }
        for numbers in wanted.numbers.iter_mut().flatten() {
            numbers.not.sort_unstable();
        }
        if let Some(values) = &mut wanted.value {
            values.not.sort_unstable();
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
    fn narrow(&mut self, result: CompareResult, operand: &'a [u8]) {
        // Of two ends the narrower, and of the same the one that does not count.
        let up = |end: &mut Option<(&'a [u8], bool)>, counts: bool| {
            if end.is_none_or(|(at, does)| operand > at || operand == at && !counts && does) {
                *end = Some((operand, counts));
            }
        };
        let down = |end: &mut Option<(&'a [u8], bool)>, counts: bool| {
            if end.is_none_or(|(at, does)| operand < at || operand == at && !counts && does) {
                *end = Some((operand, counts));
            }
        };
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
        self.least.is_none_or(|(least, counts)| value > least || counts && value == least)
            && self.most.is_none_or(|(most, counts)| value < most || counts && value == most)
            && self.not.binary_search(&value).is_err()
    }

    /// The same of all values of which these are the ends, if they tell.
    fn has_all(&self, (least, most): (&[u8], &[u8])) -> Option<bool> {
        if !self.has(least) || !self.has(most) {
            return Some(false);
        }
        let excluded = self.not.partition_point(|not| *not < least)..self.not.partition_point(|not| *not <= most);
        excluded.is_empty().then_some(true)
    }
}

#[cfg(test)]
pub(super) mod tests;
