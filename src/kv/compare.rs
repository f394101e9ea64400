//! What comparisons ask of a key.
//!
//! Many comparisons of the same keys come to few bounds: a field lies between two values, and is none of some others. So what a
//! key costs does not grow with the comparisons that concern it, but with those alone that say what a field is not, and with these
//! by their logarithm. Invariant: [`Wanted::is_met`] says what [`compare`] says of each of the comparisons.
//! Absent: which keys a comparison is about (`txn`).

use crate::pb::Fields;
use crate::pb::etcd::Compare;
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};

/// A target without its operand is compared with zero or the empty value. What this build does not know never holds.
pub(super) fn compare(c: &Compare, kv: &Fields<'_>) -> bool {
    let Some(target) = Target::of(c) else { return false };
    let order = match target {
        Target::Number(field, operand) => number(kv, field).cmp(&operand),
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

#[derive(Clone, Copy, Debug, PartialEq)]
enum Field {
    Version,
    Create,
    Mod,
    Lease,
}

const FIELDS: usize = Field::Lease as usize + 1;

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

fn number(kv: &Fields<'_>, field: Field) -> i64 {
    match field {
        Field::Version => kv.version,
        Field::Create => kv.create_revision,
        Field::Mod => kv.mod_revision,
        Field::Lease => kv.lease,
    }
}

/// What all of some comparisons ask of a key together.
pub(super) struct Wanted<'a> {
    numbers: [Option<Numbers>; FIELDS],
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
        let mut wanted = Self { numbers: [const { None }; FIELDS], value: None };
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
        let fields = [Field::Version, Field::Create, Field::Mod, Field::Lease];
        let met = |field: &Field| {
            self.numbers[*field as usize].as_ref().is_none_or(|numbers| numbers.has(number(kv, *field)))
        };
        fields.iter().all(met) && self.value.as_ref().is_none_or(|values| values.has(kv.value))
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_compare(random: &mut fastrand::Rng) -> Compare {
        let edge = |random: &mut fastrand::Rng| match random.u8(..20) {
            0 => i64::MIN,
            1 => i64::MAX,
            _ => random.i64(-2..=3),
        };
        let value = |random: &mut fastrand::Rng| vec![random.u8(b'a'..=b'c'); random.usize(..3)].into();
        let operand = match random.u8(..6) {
            0 => TargetUnion::Version(edge(random)),
            1 => TargetUnion::CreateRevision(edge(random)),
            2 => TargetUnion::ModRevision(edge(random)),
            3 => TargetUnion::Lease(edge(random)),
            _ => TargetUnion::Value(value(random)),
        };
        let target = match &operand {
            // Now and then one that is none, or has another's operand.
            _ if random.u8(..30) == 0 => random.i32(-1..=6),
            TargetUnion::Version(_) => CompareTarget::Version.into(),
            TargetUnion::CreateRevision(_) => CompareTarget::Create.into(),
            TargetUnion::ModRevision(_) => CompareTarget::Mod.into(),
            TargetUnion::Lease(_) => CompareTarget::Lease.into(),
            TargetUnion::Value(_) => CompareTarget::Value.into(),
        };
        let result = if random.u8(..30) == 0 { random.i32(-1..=5) } else { random.i32(0..=3) };
        let target_union = (random.u8(..10) > 0).then_some(operand);
        Compare { target, result, target_union, ..Default::default() }
    }

    #[test]
    fn comparisons_together_say_what_they_say_one_by_one() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut met, mut not) = (0, 0);
        for _ in 0..20_000 {
            let compares: Vec<_> = (0..random.usize(1..5)).map(|_| some_compare(&mut random)).collect();
            let wanted = Wanted::of(compares.iter());
            for _ in 0..10 {
                let value = vec![random.u8(b'a'..=b'c'); random.usize(..3)];
                let mut any = || random.i64(-2..=3);
                let (version, create_revision, mod_revision, lease) = (any(), any(), any(), any());
                let kv = Fields { version, create_revision, mod_revision, lease, value: &value, ..Fields::default() };
                let expected = compares.iter().all(|c| compare(c, &kv));
                let together = wanted.as_ref().is_some_and(|wanted| wanted.is_met(&kv));
                assert_eq!(together, expected, "{compares:?} of {kv:?}");
                if expected { met += 1 } else { not += 1 }
            }
        }
        assert!(met > 1000 && not > 1000, "{met} {not}");
    }
}
