//! What the guest can do, and what has to become of its pod.

/// What the host has to make of a behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The pod does not come up, and the error has these words.
    Unborn(&'static str),
    /// The first container is created, and some time later the pod is ended with these words, whatever the host does.
    Ended(&'static str),
    /// As before, but the guest must have been asked for something first.
    EndedWhenAsked(&'static str),
    /// A call fails with these words; the pod can be ended as any other.
    Fails(&'static str),
    /// It harms nobody: the pod lives, and can be ended as any other.
    Endures,
}

/// One way to misbehave.
#[derive(Clone, Copy, Debug)]
pub struct Behaviour {
    /// Its name, which the guest is told.
    pub name: &'static str,
    /// What has to become of the pod.
    pub fate: Fate,
}

const fn unborn(name: &'static str, words: &'static str) -> Behaviour {
    Behaviour { name, fate: Fate::Unborn(words) }
}

const fn ended(name: &'static str, words: &'static str) -> Behaviour {
    Behaviour { name, fate: Fate::Ended(words) }
}

const fn ended_when_asked(name: &'static str, words: &'static str) -> Behaviour {
    Behaviour { name, fate: Fate::EndedWhenAsked(words) }
}

const fn fails(name: &'static str, words: &'static str) -> Behaviour {
    Behaviour { name, fate: Fate::Fails(words) }
}

const fn endures(name: &'static str) -> Behaviour {
    Behaviour { name, fate: Fate::Endures }
}

/// Everything that the guest can do.
pub const BEHAVIOURS: &[Behaviour] = &[
    // Before the handshake.
    unborn("never-dials", "nothing heard from the guest"),
    unborn("wrong-magic", "a connection that the guest dialled was refused, and that too often"),
    unborn("wrong-generation", "a connection that the guest dialled was refused, and that too often"),
    unborn("reconnects-for-ever", "a connection that the guest dialled was refused, and that too often"),
    unborn("half-open", "nothing heard from the guest"),
    // At the handshake, and on the connection for calls.
    unborn("never-reads", "nothing heard from the guest"),
    unborn("never-answers", "nothing heard from the guest"),
    unborn("babbles", "is no answer"),
    unborn("giant-frame", "an answer of 4294967295 bytes"),
    unborn("answers-unasked", "nobody asked"),
    unborn("answers-twice", "nobody asked"),
    unborn("answers-as-data", "a frame of type 3 is no answer"),
    unborn("answers-garbage", "the guest"),
    // Answers.
    unborn("hangs-up-in-an-answer", "the guest"),
    unborn("pid-zero", "a process id that no kernel gives"),
    unborn("pid-too-large", "a process id that no kernel gives"),
    unborn("error-without-end", "create container: no  [2Jno  [2J"),
    ended_when_asked("answers-with-a-million-processes", "an answer of"),
    fails("unknown-fields", "metrics that are none"),
    fails("metrics-garbage", "metrics that are none"),
    fails("metrics-too-large", "metrics of more than 64 KiB"),
    fails("answers-too-late", "the guest does not answer"),
    ended_when_asked("does-not-kill", "has not ended"),
    // Events.
    ended("events-with-a-gap", "after event 0"),
    ended("events-backwards", "after event 2"),
    ended("events-of-no-kind", "which makes no sense"),
    ended("events-with-paths-for-names", "which makes no sense"),
    ended("events-of-others", "the guest claims what cannot be"),
    ended("exits-before-the-start-and-again", "the guest claims what cannot be"),
    ended("no-events-at-once", "answer with 0 events"),
    ended("too-many-events-at-once", "events"),
    endures("out-of-memory-for-ever"),
    // Streams.
    ended("guesses-streams", "a stream that the guest dialled was refused, and that too often"),
    ended("dials-streams-for-ever", "a stream that the guest dialled was refused, and that too often"),
    ended("stream-of-another-kind", "a stream that the guest dialled was refused, and that too often"),
    ended("stream-beyond-credit", "bytes more than it may"),
    ended("stream-of-garbage", "read frame"),
    ended("stream-gives-credit-for-output", "unexpected Credit frame"),
    ended("stream-forges-credit", "credit for"),
    endures("stream-without-an-end"),
    endures("stream-cut-in-a-frame"),
    endures("streams-half-open"),
    endures("floods-the-console"),
    // Archives of what a container has written.
    fails("export-never-dials", "export files to"),
    fails("export-of-garbage", "read archive"),
    fails("export-out-of-the-root", "could lead out of the root"),
    fails("export-below-a-device", "lies below something that is no directory"),
    fails("export-without-an-end", "not done after"),
];
