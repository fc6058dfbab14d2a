package s3

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"holdfast/store/location"
)

func rulesOf(inner string) string {
	return `<LifecycleConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">` + inner + `</LifecycleConfiguration>`
}

func ruleOf(inner string) string {
	return rulesOf("<Rule><Status>Enabled</Status>" + inner + "</Rule>")
}

const aDay = "<Expiration><Days>1</Days></Expiration>"

func TestLifecycleRefuses(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"no XML":                        {"rules", "MalformedXML"},
		"another document":              {"<VersioningConfiguration/>", "MalformedXML"},
		"no rule":                       {rulesOf(""), "MalformedXML"},
		"too many rules":                {rulesOf(strings.Repeat("<Rule><Status>Enabled</Status>"+aDay+"</Rule>", maxRules+1)), "MalformedXML"},
		"too long":                      {ruleOf(aDay + "<!--" + strings.Repeat("x", maxLifecycle) + "-->"), "MalformedXML"},
		"neither on nor off":            {rulesOf("<Rule><Status>Perhaps</Status>" + aDay + "</Rule>"), "MalformedXML"},
		"prefix and filter":             {ruleOf("<Prefix>a</Prefix><Filter><Prefix>b</Prefix></Filter>" + aDay), "MalformedXML"},
		"two conditions without And":    {ruleOf("<Filter><Prefix>b</Prefix><Tag><Key>k</Key><Value>v</Value></Tag></Filter>" + aDay), "MalformedXML"},
		"two rules of one name":         {rulesOf(strings.Repeat("<Rule><ID>a</ID><Status>Enabled</Status>"+aDay+"</Rule>", 2)), "InvalidArgument"},
		"nothing to do":                 {ruleOf(""), "InvalidRequest"},
		"no time":                       {ruleOf("<Expiration/>"), "MalformedXML"},
		"days and date":                 {ruleOf("<Expiration><Days>1</Days><Date>2030-01-01T00:00:00Z</Date></Expiration>"), "MalformedXML"},
		"no days at all":                {ruleOf("<Expiration><Days>0</Days></Expiration>"), "InvalidArgument"},
		"a date within a day":           {ruleOf("<Expiration><Date>2030-01-01T01:00:00Z</Date></Expiration>"), "InvalidArgument"},
		"old versions without days":     {ruleOf("<NoncurrentVersionExpiration/>"), "InvalidArgument"},
		"too many newer versions":       {ruleOf("<NoncurrentVersionExpiration><NoncurrentDays>1</NoncurrentDays><NewerNoncurrentVersions>101</NewerNoncurrentVersions></NoncurrentVersionExpiration>"), "InvalidArgument"},
		"markers by tags":               {ruleOf("<Filter><Tag><Key>k</Key><Value>v</Value></Tag></Filter><Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration>"), "InvalidRequest"},
		"uploads by size":               {ruleOf("<Filter><ObjectSizeGreaterThan>1</ObjectSizeGreaterThan></Filter><AbortIncompleteMultipartUpload><DaysAfterInitiation>1</DaysAfterInitiation></AbortIncompleteMultipartUpload>"), "InvalidRequest"},
		"no size is between":            {ruleOf("<Filter><And><ObjectSizeGreaterThan>5</ObjectSizeGreaterThan><ObjectSizeLessThan>5</ObjectSizeLessThan></And></Filter>" + aDay), "InvalidRequest"},
		"another kind of storage":       {ruleOf("<Transition><Days>1</Days><StorageClass>GLACIER</StorageClass></Transition>"), "NotImplemented"},
		"the control":                   {ruleOf(aDay), ""},
		"the control without namespace": {"<LifecycleConfiguration><Rule><Status>Disabled</Status>" + aDay + "</Rule></LifecycleConfiguration>", ""},
	} {
		l, err := parseLifecycle([]byte(c.text))
		if got := code(err); got != c.want {
			t.Errorf("%s: %q (%v), want %q", name, got, err, c.want)
		}
		if err != nil {
			continue
		}
		// What is kept is read again as the same.
		b, err := xml.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseLifecycle(b)
		if err != nil || len(again.Rules) != len(l.Rules) || again.Rules[0].ID != l.Rules[0].ID {
			t.Errorf("%s: read again: %+v, %v", name, again, err)
		}
	}
}

func FuzzLifecycle(f *testing.F) {
	f.Add([]byte(ruleOf(aDay)))
	f.Add([]byte(ruleOf("<Filter><And><Prefix>a</Prefix><Tag><Key>k</Key><Value>v</Value></Tag></And></Filter><NoncurrentVersionExpiration><NoncurrentDays>1</NoncurrentDays></NoncurrentVersionExpiration>")))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseLifecycle(b)
		if err != nil {
			return
		}
		again, err := xml.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseLifecycle(again); err != nil && len(again) <= maxLifecycle {
			t.Fatalf("%q is read, %q is not: %v", b, again, err)
		}
		l.ends("k", &object{modified: time.Unix(0, 0), size: 5}, nil, true, time.Unix(1e9, 0))
	})
}

// later plays the hourly round when so many days have gone by.
func (b *bench) later(days int) {
	b.Helper()
	now := b.now
	b.now = func() time.Time { return time.Now().Add(time.Duration(days) * day) }
	b.ok(b.runRules(b.Context(), 0))
	b.ok(b.expire(b.now().Add(-1000 * day)))
	b.now = now
}

func (b *bench) rule(inner string) {
	b.Helper()
	b.ok(b.change(inBucket, func(k *bucket) error { k.lifecycle = []byte(ruleOf(inner)); return nil }))
}

func (b *bench) there(name, id string) bool {
	b.Helper()
	_, err := b.get(name, id)
	return err == nil
}

func TestLifecycleEndsWhatItSays(t *testing.T) {
	t.Run("objects of a prefix, after their days", func(t *testing.T) {
		b := newBench(t, false)
		b.put("old/a", "x")
		b.put("new/a", "x")
		b.rule("<Filter><Prefix>old/</Prefix></Filter><Expiration><Days>3</Days></Expiration>")
		if b.later(2); !b.there("old/a", "") {
			t.Error("it ended before its time")
		}
		if b.later(5); b.there("old/a", "") || !b.there("new/a", "") {
			t.Error("after its time")
		}
		b.whole()
	})
	t.Run("by size and tags together", func(t *testing.T) {
		b := newBench(t, false)
		for _, n := range []string{"both", "small", "untagged"} {
			body := "0123456789"
			if n == "small" {
				body = "0"
			}
			b.put(n, body)
			if n != "untagged" {
				b.ok(b.PutObjectTagging(t.Context(), inBucket, n, "", map[string]string{"tmp": "1"}))
			}
		}
		b.rule("<Filter><And><Tag><Key>tmp</Key><Value>1</Value></Tag><ObjectSizeGreaterThan>5</ObjectSizeGreaterThan></And></Filter>" + aDay)
		if b.later(5); b.there("both", "") || !b.there("small", "") || !b.there("untagged", "") {
			t.Error("not what both say")
		}
		b.whole()
	})
	t.Run("a current version is hidden, and old ones go but for the newest", func(t *testing.T) {
		b := newBench(t, false)
		b.versions(types.BucketVersioningStatusEnabled)
		var ids []string
		for i := range 4 {
			ids = append(ids, b.put("k", fmt.Sprint(i)))
		}
		b.rule("<NoncurrentVersionExpiration><NoncurrentDays>2</NoncurrentDays><NewerNoncurrentVersions>1</NewerNoncurrentVersions></NoncurrentVersionExpiration>")
		if b.later(1); !b.there("k", ids[0]) {
			t.Error("an old version ended before its time")
		}
		b.later(5)
		for i, want := range []bool{false, false, true, true} {
			if b.there("k", ids[i]) != want {
				t.Errorf("version %d: %v", i, !want)
			}
		}
		b.rule(aDay)
		if b.later(5); b.there("k", "") || !b.there("k", ids[3]) {
			t.Error("the current version is not hidden, or is gone")
		}
		b.whole()
	})
	t.Run("a marker goes when nothing is behind it", func(t *testing.T) {
		b := newBench(t, false)
		b.versions(types.BucketVersioningStatusEnabled)
		alone, over := b.put("alone", "x"), b.put("over", "x")
		for _, n := range []string{"alone", "over"} {
			_, err := b.del(n, "")
			b.ok(err)
		}
		_, err := b.del("alone", alone)
		b.ok(err)
		b.rule("<Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration>")
		b.later(1)
		markers := map[string]bool{}
		for key, row := range b.m.values {
			if key[0] == rowObject {
				name, _, err := splitVersion([]byte(key))
				b.ok(err)
				o, err := parseObject(row, version{})
				b.ok(err)
				markers[name] = markers[name] || o.marker
			}
		}
		if markers["alone"] || !markers["over"] || !b.there("over", over) {
			t.Errorf("markers: %v", markers)
		}
	})
	t.Run("what is locked stays", func(t *testing.T) {
		b := newBench(t, true)
		ids := []string{b.put("k", "0"), b.put("k", "1"), b.put("k", "2")}
		b.ok(b.PutObjectLegalHold(t.Context(), inBucket, "k", ids[0], true))
		b.rule("<NoncurrentVersionExpiration><NoncurrentDays>1</NoncurrentDays></NoncurrentVersionExpiration>")
		if b.later(5); !b.there("k", ids[0]) || b.there("k", ids[1]) {
			t.Error("the locked one went, or the other one stayed")
		}
		b.whole()
	})
	t.Run("uploads that were given up", func(t *testing.T) {
		b := newBench(t, false)
		id := b.upload("tmp/k", nil)
		b.part("tmp/k", id, 1, "x")
		other := b.upload("k", nil)
		b.part("k", other, 1, "x")
		b.rule("<Prefix>tmp/</Prefix><AbortIncompleteMultipartUpload><DaysAfterInitiation>2</DaysAfterInitiation></AbortIncompleteMultipartUpload>")
		if b.later(1); len(b.m.small) != 2 {
			t.Error("it ended before its time")
		}
		if b.later(4); len(b.m.small) != 1 {
			t.Errorf("%d parts are left", len(b.m.small))
		}
		b.whole()
	})
	t.Run("a rule that is off does nothing", func(t *testing.T) {
		b := newBench(t, false)
		b.put("k", "x")
		b.ok(b.change(inBucket, func(k *bucket) error {
			k.lifecycle = []byte(rulesOf("<Rule><Status>Disabled</Status>" + aDay + "</Rule>"))
			return nil
		}))
		if b.later(9); !b.there("k", "") {
			t.Error("it ended")
		}
	})
}

// Locations hold what is locked, so that who has the front end's keys cannot delete it either: package location refuses him
// (its suite, "locked"). Here: that they are told, in time, and again.
func TestLocationsAreToldOfLocks(t *testing.T) {
	held := func(b *bench, name, id string) time.Time {
		b.Helper()
		k, err := b.bucket(inBucket)
		b.ok(err)
		for key, row := range b.m.values {
			if key[0] != rowObject {
				continue
			}
			n, at, err := splitVersion([]byte(key))
			b.ok(err)
			o, err := parseObject(row, at)
			b.ok(err)
			if n == name && o.id() == id && k.id == bucketID([]byte(key)[1:1+bucketSize]) {
				return b.m.held[o.body.Segments[0].ID]
			}
		}
		b.Fatalf("%s %s is not there", name, id)
		return time.Time{}
	}
	retention := func(mode types.ObjectLockRetentionMode, until time.Time) []byte {
		j, _ := json.Marshal(types.ObjectLockRetention{Mode: mode, RetainUntilDate: &until})
		return j
	}
	near := func(t *testing.T, what string, got, want time.Time) {
		t.Helper()
		if d := got.Sub(want); d < -time.Minute || d > time.Minute {
			t.Errorf("%s: held until %v, not %v", what, got, want)
		}
	}
	long := time.Now().Add(100 * day)

	b := newBench(t, true)
	free := b.put("free", "x")
	kept := b.put("kept", "x")
	b.ok(b.PutObjectRetention(t.Context(), inBucket, "kept", kept, retention(types.ObjectLockRetentionModeCompliance, long)))
	may := b.put("may", "x")
	b.ok(b.PutObjectRetention(t.Context(), inBucket, "may", may, retention(types.ObjectLockRetentionModeGovernance, long)))
	legal := b.put("legal", "x")
	b.ok(b.PutObjectLegalHold(t.Context(), inBucket, "legal", legal, true))
	if !held(b, "free", free).IsZero() {
		t.Error("what is not locked is held")
	}
	near(t, "compliance", held(b, "kept", kept), long)
	near(t, "governance, which who may can lift", held(b, "may", may), time.Now().Add(holdAhead))
	near(t, "a legal hold", held(b, "legal", legal), time.Now().Add(holdAhead))

	// Again a day later, as long as they are locked.
	b.ok(b.PutObjectLegalHold(t.Context(), inBucket, "legal", legal, false))
	b.now = func() time.Time { return time.Now().Add(day) }
	b.ok(b.renewHolds(t.Context()))
	near(t, "governance, renewed", held(b, "may", may), time.Now().Add(day+holdAhead))
	near(t, "a legal hold that was lifted", held(b, "legal", legal), time.Now().Add(holdAhead))
	rows := 0
	for key := range b.m.values {
		if key[0] == rowHold {
			rows++
		}
	}
	if rows != 2 {
		t.Errorf("%d locks are watched, 2 are locked", rows)
	}

	// Locations that did not hear of it hear of it later.
	b = newBench(t, true)
	id := b.put("kept", "x")
	calls := 0
	b.m.fail = func() error {
		if calls++; calls == 2 { // the row is written, then locations are told
			return location.ErrBusy
		}
		return nil
	}
	b.ok(b.PutObjectRetention(t.Context(), inBucket, "kept", id, retention(types.ObjectLockRetentionModeCompliance, long)))
	b.m.fail = nil
	if !held(b, "kept", id).IsZero() {
		t.Fatal("the control: locations were told")
	}
	b.ok(b.renewHolds(t.Context()))
	near(t, "later", held(b, "kept", id), long)
}

func TestWhatWasDeletedComesBack(t *testing.T) {
	for _, versioned := range []bool{false, true} {
		t.Run(fmt.Sprintf("versions %v", versioned), func(t *testing.T) {
			b := newBench(t, false)
			b.spare = day
			if versioned {
				b.versions(types.BucketVersioningStatusEnabled)
			}
			b.put("replaced", "before")
			b.put("deleted", "before")
			gone := b.put("ended", "before")
			since := time.Now()
			b.now = func() time.Time { return time.Now().Add(time.Minute) }
			b.put("replaced", "a thief's")
			b.put("new", "since")
			_, err := b.del("deleted", "")
			b.ok(err)
			if _, err = b.del("ended", gone); err != nil {
				t.Fatal(err)
			}
			if b.there("deleted", "") || b.there("ended", gone) {
				t.Fatal("the control: it is there")
			}
			u, err := Undelete(t.Context(), b.m, since.Add(time.Second))
			b.ok(err)
			b.has("deleted", "", "before")
			b.has("ended", "", "before")
			b.has("new", "", "since")
			if want := "before"; !versioned {
				b.has("replaced", "", want)
			}
			if u.Versions == 0 || versioned && u.Markers != 1 {
				t.Errorf("%+v", u)
			}
			// And what nobody asks back goes for good.
			b.ok(b.empty(t.Context(), time.Now().Add(2*day)))
			for key := range b.m.values {
				if key[0] == rowTrash {
					t.Error("the trash is not empty")
				}
			}
			b.whole()
		})
	}
	t.Run("a bucket", func(t *testing.T) {
		b := newBench(t, false)
		b.spare = day
		b.put("k", "x")
		since := time.Now()
		b.now = func() time.Time { return time.Now().Add(time.Minute) }
		_, err := b.del("k", "")
		b.ok(err)
		b.ok(b.DeleteBucket(t.Context(), inBucket))
		if _, err := b.bucket(inBucket); err == nil {
			t.Fatal("the control: it is there")
		}
		u, err := Undelete(t.Context(), b.m, since.Add(time.Second))
		b.ok(err)
		fresh := &bench{TB: t, m: b.m, log: b.log, objects: newBackend(b.m, b.objects.log)}
		fresh.has("k", "", "x")
		if u.Buckets != 1 {
			t.Errorf("%+v", u)
		}
	})
	t.Run("rows of nobody are refused", func(t *testing.T) {
		for _, row := range []string{"", "\x01", "\x02\x01o", "\x01\x00", "\x01\xff", "\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"} {
			if _, err := parseThrown(make([]byte, 17), []byte(row)); !errors.Is(err, errRow) {
				t.Errorf("%q: %v", row, err)
			}
		}
	})
}
