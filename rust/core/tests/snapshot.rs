//! Snapshots: the restored forest goes on bit for bit, and no bytes make it panic.

mod common;

use common::{finish, reward, specs, tree_seed};
use dynadepth_core::{Error, Forest, Result};
use proptest::prelude::*;

/// The hash at the end of a snapshot, so that tests can damage the content and still pass it.
fn sealed(content: &[u8]) -> Vec<u8> {
    let hash = content
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    [content, &hash.to_le_bytes()].concat()
}

/// Asks and tells some plans, and leaves some tickets open.
fn advance(forest: &mut Forest, steps: usize, max_plans: usize) -> Result<Vec<u64>> {
    let spec = forest.spec().clone();
    let mut open = Vec::new();
    for step in 0..steps {
        let batch = forest.ask(max_plans)?;
        for ((&tree, plan), &ticket) in batch
            .tree
            .iter()
            .zip(batch.plans.chunks(spec.num_layers))
            .zip(&batch.ticket)
        {
            let key = spec.tree_keys[tree as usize];
            if step + 1 == steps && ticket % 2 == 1 {
                open.push(ticket);
            } else {
                forest.tell(&[ticket], &[reward(tree_seed(spec.seed, key), plan)])?;
            }
        }
    }
    Ok(open)
}

fn check_restored(mut forest: Forest, open: &[u64]) -> Result<()> {
    let snapshot = forest.snapshot();
    let mut restored = Forest::restore(&snapshot)?;
    assert_eq!(restored.snapshot(), snapshot);
    for tree in 0..forest.num_trees() {
        assert_eq!(restored.evaluated(tree)?, forest.evaluated(tree)?);
        assert_eq!(restored.best(tree), forest.best(tree));
        assert_eq!(restored.tree_finished(tree)?, forest.tree_finished(tree)?);
    }
    let rewards = vec![0.25; open.len()];
    forest.tell(open, &rewards)?;
    restored.tell(open, &rewards)?;
    assert_eq!(finish(&mut restored, 7)?, finish(&mut forest, 7)?);
    assert_eq!(restored.snapshot(), forest.snapshot());
    Ok(())
}

proptest! {
    #[test]
    fn a_restored_forest_goes_on_alike(
        spec in specs(),
        steps in 0_usize..8,
        max_plans in 1_usize..12,
    ) {
        let outcome = Forest::new(spec).and_then(|mut forest| {
            let open = advance(&mut forest, steps, max_plans)?;
            check_restored(forest, &open)
        });
        prop_assert_eq!(outcome, Ok(()));
    }

    #[test]
    fn cut_or_flipped_bytes_are_refused(spec in specs(), steps in 0_usize..6, at in any::<prop::sample::Index>()) {
        let snapshot = Forest::new(spec).and_then(|mut forest| {
            advance(&mut forest, steps, 5)?;
            Ok(forest.snapshot())
        });
        let snapshot = snapshot.map_err(|error| TestCaseError::fail(error.to_string()))?;
        let place = at.index(snapshot.len());
        prop_assert!(matches!(Forest::restore(&snapshot[..place]), Err(Error::Snapshot(_))));
        let mut flipped = snapshot.clone();
        flipped[place] ^= 1;
        prop_assert!(matches!(Forest::restore(&flipped), Err(Error::Snapshot(_))));
        prop_assert!(Forest::restore(&[&snapshot[..], &[0]].concat()).is_err());
    }

    #[test]
    fn a_lie_with_a_right_hash_never_panics(
        spec in specs(),
        steps in 0_usize..6,
        lies in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let snapshot = Forest::new(spec).and_then(|mut forest| {
            advance(&mut forest, steps, 5)?;
            Ok(forest.snapshot())
        });
        let mut snapshot = snapshot.map_err(|error| TestCaseError::fail(error.to_string()))?;
        snapshot.truncate(snapshot.len() - 8);
        for (place, byte) in lies {
            let place = place.index(snapshot.len());
            snapshot[place] = byte;
        }
        if let Ok(mut forest) = Forest::restore(&sealed(&snapshot)) {
            prop_assert!(forest.ask(10).is_ok());
        }
    }

    #[test]
    fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Forest::restore(&bytes).is_err());
        let headed = [b"DDFOREST\x01\0\0\0".as_slice(), &bytes].concat();
        prop_assert!(Forest::restore(&sealed(&headed)).is_err());
    }
}

#[test]
fn another_version_is_named() {
    let content = [b"DDFOREST\x63\0\0\0".as_slice(), &[0; 16]].concat();
    let message = Forest::restore(&sealed(&content))
        .map(|_| ())
        .map_err(|error| error.to_string());
    let expected =
        "the snapshot cannot be restored: it has version 99, this build reads version 1; \
                    restore it with the build that wrote it";
    assert_eq!(message, Err(expected.to_owned()));
}
