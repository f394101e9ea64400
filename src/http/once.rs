//! Whether a body in JSON has a field twice, which etcd's gateway refuses: of two values nobody can say which one was meant.
//!
//! Goes by the descriptor, so that a field's two names are one, and unknown fields are nothing. Absent: every other fault of a body, which
//! the decoder finds.

use std::fmt;

use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Fails at a field that is there for the second time, in `message` or in a message within it. Whatever else does not fit is passed over.
pub(super) fn check<'de, D: Deserializer<'de>>(message: &MessageDescriptor, json: D) -> Result<(), D::Error> {
    Message(message).deserialize(json)
}

/// A message, several of them, or what is neither.
struct Message<'a>(&'a MessageDescriptor);

impl<'de> DeserializeSeed<'de> for Message<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Message<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = Vec::new();
        while let Some(field) = map.next_key_seed(Name(self.0))? {
            let Some(field) = field else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if seen.contains(&field.number()) {
                return Err(A::Error::custom(format!("duplicate field {:?}", field.name())));
            }
            seen.push(field.number());
            match field.kind() {
                Kind::Message(inner) => map.next_value_seed(Message(&inner))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Message(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}

/// The field of a message that a name stands for, if one does.
struct Name<'a>(&'a MessageDescriptor);

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = Option<FieldDescriptor>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_> {
    type Value = Option<FieldDescriptor>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.get_field_by_json_name(name).or_else(|| self.0.get_field_by_name(name)))
    }
}
