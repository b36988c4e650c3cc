use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::TempDir;

use super::*;

fn place() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn store(place: &TempDir) -> HostStore {
    HostStore::open_in("run", &[place.path().to_owned()]).expect("a store")
}

fn folder(place: &TempDir) -> PathBuf {
    place.path().join(format!("pacs-{}-run", user()))
}

/// Content of three pieces, the last of them short.
fn numbers(seed: u32) -> Vec<u8> {
    (0..600_000u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed)).flat_map(u32::to_le_bytes).collect()
}

fn describe(version: u64) -> (Description, Vec<u8>) {
    let content = numbers(u32::try_from(version).expect("small"));
    (Description::of(VersionId::new(1, version), WeightKind::Float32, &content), content)
}

fn ours(claim: Claim) -> Part {
    match claim {
        Claim::Ours(part) => part,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_one_process_publishes_another_finds() {
    let place = place();
    let (writer, reader) = (store(&place), store(&place));
    let (description, content) = describe(3);
    let published = writer.publish(description.id(), WeightKind::Float32, &content).expect("room");
    assert_eq!(published.description(), &description, "published and described alike");
    let found = reader.find(&description).expect("readable").expect("it is there");
    assert_eq!(super::content(&found), content);
    assert!(matches!(reader.claim(&description), Ok(Claim::Whole(_))), "nothing to fetch");
    let mode = |path: &Path| fs::metadata(path).expect("it exists").permissions().mode() & 0o777;
    assert_eq!(mode(&folder(&place)), 0o700);
    assert_eq!(mode(&folder(&place).join(description.file_name())), 0o600);
    // A retired version stays readable for those who have it open.
    writer.retire_before(VersionId::new(1, 4));
    assert!(reader.find(&description).expect("readable").is_none());
    assert_eq!(super::content(&found), content);
    assert_eq!(fs::read(found.open_name()).expect("it can be opened again"), content);
}

#[test]
fn versions_of_one_number_and_other_content_are_told_apart() {
    let place = place();
    let store = store(&place);
    let id = VersionId::new(1, 1);
    let (first, second) = (numbers(1), numbers(2));
    store.publish(id, WeightKind::Float32, &first).expect("room");
    let other = Description::of(id, WeightKind::Float32, &second);
    assert!(store.find(&other).expect("readable").is_none());
}

#[test]
fn one_brings_a_version_and_the_next_resumes_what_it_left() {
    let place = place();
    let (first, second) = (store(&place), store(&place));
    let (description, content) = describe(7);
    let part = ours(first.claim(&description).expect("room"));
    assert!(matches!(second.claim(&description), Ok(Claim::Theirs)));
    assert_eq!(part.verified().expect("readable"), [false; 3]);
    // Two and a half pieces, one of them wrong; then the process is killed, and the kernel releases the lock.
    let half = usize::try_from(description.piece(2).start).expect("small") + 1000;
    let mut torn = content[..half].to_vec();
    torn[5] ^= 1;
    part.write(&torn, 0).expect("room");
    drop(part);
    let part = ours(second.claim(&description).expect("room"));
    assert_eq!(part.verified().expect("readable"), [false, true, false]);
    part.write(&content, 0).expect("room");
    let whole = part.finish().expect("renamed");
    assert_eq!(super::content(&whole), content);
    let Ok(Claim::Whole(found)) = first.claim(&description) else { panic!("it is whole") };
    assert_eq!(super::content(&found), content);
    let left = fs::read_dir(folder(&place)).expect("the folder").count();
    assert_eq!(left, 2, "the lock and the version");
}

#[test]
fn the_last_one_out_removes_the_folder_and_leftovers_are_swept() {
    let place = place();
    let (first, second) = (store(&place), store(&place));
    drop(first);
    assert!(folder(&place).exists(), "it is in use");
    second.leave();
    assert!(!folder(&place).exists());
    let third = store(&place);
    drop(second);
    assert!(folder(&place).exists(), "it is another's by now");
    drop(third);
    // A killed process leaves its folder without a lock.
    let left = place.path().join(format!("pacs-{}-killed", user()));
    DirBuilder::new().mode(0o700).create(&left).expect("created");
    fs::write(left.join("1-1-00"), b"weights").expect("written");
    let in_use = HostStore::open_in("other", &[place.path().to_owned()]).expect("a store");
    assert!(!left.exists(), "swept");
    let third = store(&place);
    assert!(place.path().join(format!("pacs-{}-other", user())).exists(), "what is in use is not");
    drop((in_use, third));
    assert_eq!(fs::read_dir(place.path()).expect("the place").count(), 0);
}

#[test]
fn a_folder_that_is_not_ours_alone_is_refused() {
    let place = place();
    let path = folder(&place);
    let refused = || match HostStore::open_in("run", &[place.path().to_owned()]) {
        Err(StoreError::NotOurs { found, .. }) => found,
        other => panic!("{other:?}"),
    };
    let elsewhere = self::place();
    symlink(elsewhere.path(), &path).expect("a link");
    assert_eq!(refused(), "a symbolic link");
    fs::remove_file(&path).expect("removed");
    DirBuilder::new().mode(0o755).create(&path).expect("created");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
    assert_eq!(refused(), "of mode 0755");
    fs::remove_dir(&path).expect("removed");
    fs::write(&path, b"").expect("written");
    assert_eq!(refused(), "no folder");
    assert!(matches!(HostStore::open_in("../run", &[place.path().to_owned()]), Err(StoreError::Run(_))));
}

#[test]
fn links_in_the_folder_are_not_followed() {
    let place = place();
    let store = store(&place);
    let (description, content) = describe(1);
    let elsewhere = self::place();
    fs::write(elsewhere.path().join("secret"), &content).expect("written");
    symlink(elsewhere.path().join("secret"), folder(&place).join(description.file_name())).expect("a link");
    assert!(store.find(&description).is_err());
    symlink(elsewhere.path().join("new"), folder(&place).join(format!("{}.part", describe(2).0.file_name())))
        .expect("a link");
    assert!(store.claim(&describe(2).0).is_err());
    assert!(!elsewhere.path().join("new").exists());
}

#[test]
fn without_room_the_next_place_is_taken() {
    let places = [place(), place()];
    let store = HostStore::open_in("run", &places.each_ref().map(|place| place.path().to_owned())).expect("a store");
    let too_large = u64::MAX / 2;
    let Err(StoreError::NoRoom { needed, free, .. }) = store.folders[0].check_room(too_large) else {
        panic!("no room")
    };
    assert!(needed == too_large && free < too_large);
    let (description, content) = describe(1);
    let mut tried = Vec::new();
    let made = store.with_room(1, |folder| {
        tried.push(folder.path.clone());
        match tried.len() {
            1 => Err(StoreError::NoRoom { path: folder.path.clone(), needed: 1, free: 0 }),
            _ => folder.publish(description.id(), WeightKind::Float32, None, &content),
        }
    });
    made.expect("the second has room");
    assert!(tried[1].starts_with(places[1].path()));
    assert!(store.find(&description).expect("readable").is_some(), "both are looked into");
}
